"""The backward of mode "fused", in two launches.

The first one dispatches dy within the down dgrad. The second one combines dx under the up dgrad and
both weight gradients. Nothing is planned: `prepare_backward` makes the tile orders from the
forward's plan. With save="nothing", the forward's `dispatch_gemm` comes before both.
"""

from __future__ import annotations

from cometrt.activations import ACTIVATIONS
from cometrt.cuda.backward import (
    PlanTables,
    dgrad_tiles,
    down_dgrad_arguments,
    wgrad_params,
    wgrad_shapes,
    wgrads_of,
)
from cometrt.cuda.dgrad import DownDgradArguments, dgrad_maps
from cometrt.cuda.engine import TileOrder, gemm_ctas, raster_group_of
from cometrt.cuda.exchange_params import Call, ExchangeParamsBuilder
from cometrt.cuda.fused import FusedPath, n_chunk_tiles, num_comm_ctas, path_macros
from cometrt.cuda.links import Links
from cometrt.cuda.types import Launches
from cometrt.cuda.wgrad import WgradArguments, max_wgrad_steps, wgrad_raster_group
from cometrt.kernels.constants import BLOCK_K
from cometrt.kernels.launch import Kernel, load_kernels
from cometrt.kernels.params import (
    ParamStruct,
    up_dgrad_wgrad_params_dtype,
    wgrad_params_dtype,
)
from cometrt.plan import PlanShape
from cometrt.world.partitions import num_sms

_WGRAD_WORDS = wgrad_params_dtype.itemsize // 8  # UpDgradWgradParams begins with a WgradParams


class FusedBackward(FusedPath):
    """The path of one layer's fused backward: its two launches, and `prepare_backward` before them.

    With save="z" the first launch pulls x again, behind dy. With save="nothing" the forward's
    `dispatch_gemm` does so before it, and computes z again. So all pulls of this rank have ended
    before the last launch sends a partial row of dx.

    Args:
        builder: of the params that `launch` gets.
        table_offsets: byte offset of each of a plan's tables, by name.
        ok: address of ExchangeState.ok.
        recompute: TileOrderParams of `dispatch_gemm`, if it computes z again; else null.
        kernels: gets "prepare_backward", "dispatch_down_dgrad" and "up_dgrad_combine_wgrad".
    """

    def __init__(
        self,
        shape: PlanShape,
        links: Links,
        builder: ExchangeParamsBuilder,
        table_offsets: dict[str, int],
        ok: int,
        recompute: ParamStruct,
        kernels: Launches,
    ) -> None:
        geometry, rows = shape.geometry, shape.capacity
        spec, experts, up = geometry.spec, geometry.num_weights, geometry.up_columns
        self._links, self._activation, self._builder = links, spec.activation, builder
        self._shape = shape
        self._recompute, self._recomputes = recompute, spec.save == "nothing"
        self._tables, shapes = PlanTables(table_offsets), wgrad_shapes(geometry)
        n_tiles = dgrad_tiles(geometry)
        self._down_order = TileOrder(
            shape.max_tiles,
            n_tiles["down_dgrad"],
            num_weights=experts,
        )
        self._grads_order = TileOrder(
            shape.max_tiles,
            n_tiles["up_dgrad"],
            n_chunk=n_chunk_tiles(shape.of_backward()),
            backwards=True,
            more_steps=max_wgrad_steps(experts, shapes),
            num_weights=experts,
        )
        self._down = DownDgradArguments(
            self._down_order, rows, spec.hidden, geometry.local_intermediate, experts, ok=ok
        )
        group = wgrad_raster_group(num_sms())
        self._wgrads = WgradArguments(
            self._grads_order,
            rows,
            shapes,
            experts,
            row_sets=geometry.row_sets,
            raster_group=group,
            ok=ok,
        )
        self._dz_and_w_up = (1, 1, rows, up), (1, experts, up, spec.hidden)
        self._grads = ParamStruct(up_dgrad_wgrad_params_dtype)
        self._grads.fields["num_dx_k_blocks"] = -(-up // BLOCK_K)
        dx = self._grads.fields["dx"][0]
        dx["num_rows"], dx["num_columns"] = rows, spec.hidden
        self.num_ctas = gemm_ctas()
        self.reschedule(shape)
        (self._prepare,) = load_kernels("fused/prepare_backward.cu", "prepare_backward")
        self._kernels = self.load()
        kernels |= {
            "prepare_backward": self._launch_prepare,
            "dispatch_down_dgrad": self._dispatch_down_dgrad,
            "up_dgrad_combine_wgrad": self._up_dgrad_combine_wgrad,
        }

    def reschedule(self, shape: PlanShape) -> None:
        shape = shape.of_backward()
        config, hidden = shape.config, shape.geometry.spec.hidden
        group, up = config.raster_group, shape.geometry.up_columns
        self._down_order.walk(None, group or raster_group_of(hidden))
        self._grads_order.walk(n_chunk_tiles(shape), group or raster_group_of(up))
        self._dispatch_ctas = num_comm_ctas(config.dispatch_ctas, self.num_ctas)
        self._combine_ctas = num_comm_ctas(config.combine_ctas, self.num_ctas)

    def load(self, *, trace: bool = False) -> dict[str, Kernel]:
        macros = (*path_macros(self._shape, trace), *self._links.macros)
        activation = (("ACTIVATION", list(ACTIVATIONS).index(self._activation)), *macros)
        (dispatch,) = load_kernels(
            "fused/dispatch_down_dgrad.cu", "dispatch_down_dgrad", macros=activation
        )
        (combine,) = load_kernels(
            "fused/up_dgrad_combine_wgrad.cu", "up_dgrad_combine_wgrad", macros=macros
        )
        return {"dispatch": dispatch, "combine": combine}

    def launch(self, kernels: Launches, stream: int, params: ParamStruct, call: Call) -> None:
        if self._recomputes:
            self._builder.pull_x(params, call)
            kernels["dispatch_gemm"](stream, params, call)
            self._builder.pull_dy(params, call)
        kernels["dispatch_down_dgrad"](stream, params, call)
        kernels["up_dgrad_combine_wgrad"](stream, params, call)

    def _launch_prepare(self, stream: int, params: ParamStruct, call: Call) -> None:
        """Make the tile orders, zero padding rows, and wait for all ranks."""
        self._prepare(
            stream,
            num_sms(),
            params,
            self._tables.planned(call),
            self._recompute,
            self._down_order.params,
            self._grads_order.params,
            wgrad_params(self._wgrads, self._tables, call),
        )

    def _dispatch_down_dgrad(self, stream: int, params: ParamStruct, call: Call) -> None:
        """Pull dy into dy_rows, and multiply: dz, weighted_a and dweight_rows. Pull x again with
        save="z"."""
        self._kernels["dispatch"](
            stream,
            self.num_ctas,
            params,
            *down_dgrad_arguments(self._down, self._tables, call),
            self._links.dispatch,
            self._dispatch_ctas,
        )

    def _up_dgrad_combine_wgrad(self, stream: int, params: ParamStruct, call: Call) -> None:
        """Compute rows of dx and both weight gradients; combine dx. Waits for peers."""
        at, words = call.at, self._grads.uint64s
        words[:_WGRAD_WORDS] = wgrad_params(self._wgrads, self._tables, call).uint64s
        self._grads.fields["dx"]["out"] = at["dx_rows"]
        dz, w_up = self._dz_and_w_up
        self._kernels["combine"](
            stream,
            self.num_ctas,
            params,
            self._grads,
            *dgrad_maps(at["dz"], dz, at["w_up"], w_up),
            self._wgrads.maps(wgrads_of(call)),
            self._links.combine,
            self._combine_ctas,
        )
