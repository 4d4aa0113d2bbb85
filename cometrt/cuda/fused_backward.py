"""The fused backward: dispatch of dy within the down dgrad's launch, then combine of dx under the
up dgrad and the weight gradients. It plans nothing: `prepare_backward` orders the tiles of its
GEMMs by the forward's plan."""

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
from cometrt.cuda.exchange_params import Call
from cometrt.cuda.fused import FusedPath, n_chunk_tiles, num_comm_ctas, trace_macros
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

_WGRAD_WORDS = wgrad_params_dtype.itemsize // 8  # with which UpDgradWgradParams begin


class FusedBackward(FusedPath):
    """One layer's two launches, and the one before them.

    With save="z" the first launch pulls x again, behind dy. So all pulls of this rank have ended
    before the second launch sends a partial row of dx.

    Args:
        table_offsets: byte offset of each of a plan's tables, by name.
        ok: address of ExchangeState.ok.
        kernels: gets "prepare_backward", "dispatch_down_dgrad" and "up_dgrad_combine_wgrad".
    """

    def __init__(
        self,
        shape: PlanShape,
        links: Links,
        table_offsets: dict[str, int],
        ok: int,
        kernels: Launches,
    ) -> None:
        geometry, rows = shape.geometry, shape.capacity
        spec, experts, up = geometry.spec, geometry.local_experts, geometry.up_columns
        self._links, self._activation = links, spec.activation
        self._tables, shapes = PlanTables(table_offsets), wgrad_shapes(geometry)
        n_tiles = dgrad_tiles(geometry)
        self._down_order = TileOrder(
            shape.max_tiles,
            n_tiles["down_dgrad"],
        )
        self._grads_order = TileOrder(
            shape.max_tiles,
            n_tiles["up_dgrad"],
            n_chunk=n_chunk_tiles(shape.of_backward()),
            backwards=True,
            more_steps=max_wgrad_steps(experts, shapes),
        )
        self._down = DownDgradArguments(
            self._down_order, rows, spec.hidden, geometry.local_intermediate, experts, ok=ok
        )
        group = wgrad_raster_group(num_sms())
        self._wgrads = WgradArguments(
            self._grads_order, rows, shapes, experts, raster_group=group, ok=ok
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
        macros = (*self._links.macros, *trace_macros(trace))
        activation = (("ACTIVATION", list(ACTIVATIONS).index(self._activation)), *macros)
        (dispatch,) = load_kernels(
            "fused/dispatch_down_dgrad.cu", "dispatch_down_dgrad", macros=activation
        )
        (combine,) = load_kernels(
            "fused/up_dgrad_combine_wgrad.cu", "up_dgrad_combine_wgrad", macros=macros
        )
        return {"dispatch": dispatch, "combine": combine}

    def launch(self, kernels: Launches, stream: int, params: ParamStruct, call: Call) -> None:
        kernels["dispatch_down_dgrad"](stream, params, call)
        kernels["up_dgrad_combine_wgrad"](stream, params, call)

    def _launch_prepare(self, stream: int, params: ParamStruct, call: Call) -> None:
        """Wait for all ranks; order the tiles, and zero padding rows."""
        self._prepare(
            stream,
            num_sms(),
            params,
            self._tables.planned(call),
            self._down_order.params,
            self._grads_order.params,
            wgrad_params(self._wgrads, self._tables, call),
        )

    def _dispatch_down_dgrad(self, stream: int, params: ParamStruct, call: Call) -> None:
        """Pull dy into dy_rows, and multiply: dz, weighted_a and dweight_rows. Pull x again."""
        self._kernels["dispatch"](
            stream,
            self.num_ctas,
            params,
            *down_dgrad_arguments(self._down, self._tables, call),
            self._links.dispatch,
            self._dispatch_ctas,
        )

    def _up_dgrad_combine_wgrad(self, stream: int, params: ParamStruct, call: Call) -> None:
        """Multiply, push partial rows of dx, and add up at home. Waits for peers."""
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
