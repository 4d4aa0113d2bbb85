"""The backward of the modes "sequential" and "chunked": one launch after the other on one stream.

GEMMs are the engine's, so the host needs no row counts and waits for nothing. A backward can be
captured and replayed as a CUDA graph. `cometrt.cuda.cublas` has the same backward with cuBLAS's
GEMMs, `cometrt.cuda.fused_backward` that of mode "fused".
"""

from __future__ import annotations

import numpy as np

from cometrt.cuda.dgrad import (
    DgradArguments,
    DownDgradArguments,
    dgrad_kernel,
    dgrad_n_tiles,
    down_dgrad_kernel,
)
from cometrt.cuda.engine import TileOrder, gemm_ctas, raster_group_of
from cometrt.cuda.exchange_params import Call, ExchangeParamsBuilder
from cometrt.cuda.types import Launches
from cometrt.cuda.wgrad import (
    WgradAddresses,
    WgradArguments,
    WgradOrder,
    wgrad_raster_group,
)
from cometrt.kernels.launch import load_kernels
from cometrt.kernels.params import KernelArgument, ParamStruct, planned_tiles_dtype
from cometrt.plan import PlanShape
from cometrt.specs import Geometry
from cometrt.world.partitions import num_sms

_ORDER_CTAS = 16  # of the launch that orders tiles


def wgrad_shapes(geometry: Geometry) -> tuple[tuple[int, int], tuple[int, int]]:
    """(M, N) of one expert's w_up and w_down."""
    hidden = geometry.spec.hidden
    return (geometry.up_columns, hidden), (hidden, geometry.local_intermediate)


def dgrad_tiles(geometry: Geometry) -> dict[str, int]:
    """Number of N-tiles of the down dgrad and of the up dgrad."""
    columns = {"down_dgrad": geometry.local_intermediate, "up_dgrad": geometry.spec.hidden}
    return {name: dgrad_n_tiles(width) for name, width in columns.items()}


class PlanTables:
    """Addresses of the tables of a call's plan.

    Args:
        table_offsets: byte offset of each of a plan's tables, by name.
    """

    def __init__(self, table_offsets: dict[str, int]) -> None:
        self._offsets, self._planned = table_offsets, ParamStruct(planned_tiles_dtype)
        names = planned_tiles_dtype.names or ()
        self._planned_offsets = np.array([table_offsets[name] for name in names], np.uint64)

    def address(self, call: Call, name: str) -> int:
        return call.at["tables"] + self._offsets[name]

    def planned(self, call: Call) -> ParamStruct:
        """PlannedTiles of a call. The next call of this method overwrites it."""
        self._planned.uint64s[:] = self._planned_offsets + np.uint64(call.at["tables"])
        return self._planned


class BackwardGemms:
    """The GEMMs of one layer's backward.

    Args:
        table_offsets: byte offset of each of a plan's tables, by name.
        ok: address of ExchangeState.ok.
        recompute: TileOrderParams of the up GEMM, if it computes z again; else null.
        kernels: gets "backward_order", "down_dgrad", "up_dgrad" and "wgrad".
    """

    def __init__(
        self,
        shape: PlanShape,
        table_offsets: dict[str, int],
        ok: int,
        recompute: ParamStruct,
        kernels: Launches,
    ) -> None:
        geometry, spec, rows = shape.geometry, shape.geometry.spec, shape.capacity
        experts, width, up = (
            geometry.num_weights,
            geometry.local_intermediate,
            geometry.up_columns,
        )
        inner = {"down_dgrad": spec.hidden, "up_dgrad": up}
        # The up dgrad begins with the rows of dz that were written last: L2 still has them.
        self._orders = {
            name: TileOrder(
                shape.max_tiles,
                n_tiles,
                raster_group=shape.config.raster_group or raster_group_of(inner[name]),
                backwards=name == "up_dgrad",
                num_weights=experts,
            )
            for name, n_tiles in dgrad_tiles(geometry).items()
        }
        self._down = DownDgradArguments(
            self._orders["down_dgrad"], rows, spec.hidden, width, experts, ok=ok
        )
        self._up = DgradArguments(self._orders["up_dgrad"], rows, up, spec.hidden, experts, ok=ok)
        shapes = wgrad_shapes(geometry)
        self._wgrad_order = WgradOrder(experts, shapes)
        group = wgrad_raster_group(num_sms())
        self._wgrads = WgradArguments(
            self._wgrad_order,
            rows,
            shapes,
            experts,
            row_sets=geometry.row_sets,
            raster_group=group,
            ok=ok,
        )
        self._tables, self._recompute = PlanTables(table_offsets), recompute
        (self._order_kernel,) = load_kernels("gemm/backward_order.cu", "backward_order")
        self._down_kernel, self._up_kernel = down_dgrad_kernel(spec.activation), dgrad_kernel()
        (self._wgrad_kernel,) = load_kernels("gemm/grouped_wgrad.cu", "grouped_wgrad")
        kernels |= {
            "backward_order": self._launch_order,
            "down_dgrad": self._launch_down,
            "up_dgrad": self._launch_up,
            "wgrad": self._launch_wgrad,
        }

    def _launch_order(self, stream: int, call: Call) -> None:
        """Make the tile orders of all GEMMs from the plan's tables."""
        orders = (order.params for order in self._orders.values())
        params = wgrad_params(self._wgrads, self._tables, call)
        tables = self._tables.planned(call)
        self._order_kernel(stream, _ORDER_CTAS, tables, self._recompute, *orders, params)

    def _launch_down(self, stream: int, call: Call) -> None:
        """Compute dz, weighted_a and dweight from dy and z."""
        arguments = down_dgrad_arguments(self._down, self._tables, call)
        self._down_kernel(stream, gemm_ctas(), *arguments)

    def _launch_up(self, stream: int, call: Call) -> None:
        """Compute rows of dx from dz."""
        arguments = self._up(call.at["dz"], call.at["w_up"], call.at["dx_rows"])
        self._up_kernel(stream, gemm_ctas(), *arguments)

    def _launch_wgrad(self, stream: int, call: Call) -> None:
        """Compute the gradients of both weights."""
        params = wgrad_params(self._wgrads, self._tables, call)
        self._wgrad_kernel(stream, gemm_ctas(), params, self._wgrads.maps(wgrads_of(call)))


def down_dgrad_arguments(
    arguments: DownDgradArguments, tables: PlanTables, call: Call
) -> tuple[KernelArgument, ...]:
    """Kernel arguments of a call's down dgrad: dz, weighted_a and dweight from dy and z."""
    at = call.at
    return arguments(
        at["dy_rows"],
        at["w_down"],
        z=at["z"],
        row_weight=tables.address(call, "row_weight"),
        dz=at["dz"],
        weighted_a=at["weighted_a"],
        dweight=at["dweight_rows"],
    )


def wgrad_params(arguments: WgradArguments, tables: PlanTables, call: Call) -> ParamStruct:
    """WgradParams of a call."""
    offsets, rows = (tables.address(call, name) for name in ("expert_offsets", "expert_rows"))
    return arguments.params(offsets, rows, wgrads_of(call), accumulate=call.accumulate)


def wgrads_of(call: Call) -> tuple[WgradAddresses, WgradAddresses]:
    """A call's gradients of w_up and w_down, with their operands."""
    at, (up, down) = call.at, call.float32_gradients
    return (
        WgradAddresses(at["dz"], at["x_rows"], at["dw_up"], up),
        WgradAddresses(at["dy_rows"], at["weighted_a"], at["dw_down"], down),
    )


class EngineBackward:
    """The path of a backward: launches of BackwardGemms and RowKernels, one after the other. Weight
    gradients stand between push and home_reduce: partial rows of dx arrive meanwhile.

    Args:
        num_up_launches: of the up GEMM, which computes z again with save="nothing".
    """

    def __init__(self, builder: ExchangeParamsBuilder, num_up_launches: int) -> None:
        self._builder, self._num_up_launches = builder, num_up_launches

    def launch(self, kernels: Launches, stream: int, params: ParamStruct, call: Call) -> None:
        kernels["backward_order"](stream, call)
        kernels["dispatch"](stream, params)
        if "saved_x" in call.at:  # x again: before the first partial row of dx leaves
            self._builder.pull_x(params, call)
            kernels["dispatch"](stream, params)
        for chunk in range(self._num_up_launches):
            kernels["up"](stream, call, chunk)
        kernels["down_dgrad"](stream, call)
        kernels["up_dgrad"](stream, call)
        kernels["push"](stream, params)
        kernels["wgrad"](stream, call)
        kernels["home_reduce"](stream, params)
