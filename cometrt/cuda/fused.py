"""The fused forward: dispatch within the up GEMM's launch, combine within the down GEMM's."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from cometrt.activations import ACTIVATIONS
from cometrt.cuda.engine import (
    SHARED_BYTES,
    THREADS,
    gemm_arguments,
    gemm_grid,
    layer_n_tiles,
    layer_raster_groups,
    new_gemm_params,
    new_tile_order,
    tile_order_params,
)
from cometrt.kernels.launch import Kernel, load_kernels
from cometrt.kernels.params import KernelArgument, ParamStruct
from cometrt.plan import PlanShape
from cometrt.plan.tile_order import BLOCK_N

# sizeof(Memory) of fused/layer0.cu and fused/layer1.cu
_LAYER0_BYTES = SHARED_BYTES + 6 * 4096 + 128
_LAYER1_BYTES = SHARED_BYTES + 2 * 13696


_NUM_ARRIVALS = 3  # kNumArrivals of exchange/call.cuh


def _counter_words(shape: PlanShape) -> dict[str, int]:
    num_chunks = shape.config.num_n_chunks(shape.geometry.spec.hidden)
    return {
        "tile_filled": shape.max_tiles,
        "tile_done": shape.max_tiles * num_chunks,
        "queue_heads": 1 + 2 * num_chunks,
        "arrivals": _NUM_ARRIVALS,
    }


def fused_counters(shape: PlanShape) -> int:
    """32-bit words of FusedForward's `counters`."""
    return sum(_counter_words(shape).values())


def tiles_of_n_chunk(shape: PlanShape) -> int:
    """Column tiles of layer1 that make a chunk."""
    return -(-shape.config.n_chunks(shape.geometry.spec.hidden)[0][1] // BLOCK_N)


class FusedKernels(NamedTuple):
    layer0: tuple[Kernel, ...]  # without z, with z
    layer1: Kernel


class FusedForward:
    """One layer's two launches.

    Args:
        dispatch_link, combine_link: of `link_params`, for what comes and what leaves.
        counters: [fused_counters(shape)] uint32, zero whenever a call begins.
        ok: address of the call's CallState.ok.

    Attributes:
        up_order, down_order: how the planner orders tiles for it: a TurnsParams each.
        grid: of both launches.
        kernels: what is launched; of `load_kernels`.
        counters: by field of Call.
    """

    def __init__(
        self,
        shape: PlanShape,
        dispatch_link: ParamStruct,
        combine_link: ParamStruct,
        counters: Any,
        ok: int,
    ) -> None:
        geometry, config, spec = shape.geometry, shape.config, shape.geometry.spec
        self._gated, width = spec.gated, geometry.local_intermediate
        groups, (up, down), chunk = (
            layer_raster_groups(shape),
            layer_n_tiles(shape),
            tiles_of_n_chunk(shape),
        )
        turns = (
            new_tile_order(shape.max_tiles, up),
            new_tile_order(shape.max_tiles, down, chunk),
        )
        self._turns = turns
        self.up_order = tile_order_params(turns[0], up, raster_group=groups[0])
        self.down_order = tile_order_params(
            turns[1], down, backwards=True, n_chunk=chunk, raster_group=groups[1]
        )
        self._up_params = new_gemm_params(turns[0], spec.hidden, width, ok)
        self._down_params = new_gemm_params(turns[1], width, spec.hidden, ok)
        self._activation = list(ACTIVATIONS).index(spec.activation)
        self.kernels = self.load_kernels()
        self.counters, begin = {}, 0
        for name, words in _counter_words(shape).items():
            self.counters[name] = counters[begin : begin + words]
            begin += words
        self._dispatch_link, self._combine_link = dispatch_link, combine_link
        self.grid = gemm_grid()
        self._num_comm0 = KernelArgument(num_comm_ctas(config.dispatch_ctas, self.grid[0]))
        self._num_comm1 = KernelArgument(num_comm_ctas(config.combine_ctas, self.grid[0]))

    def load_kernels(self, *, trace: bool = False) -> FusedKernels:
        """Before any of them waits for a peer."""
        traced = (("TRACE", 1),) if trace else ()
        layer0: list[Kernel] = []
        for z in (0, 1):
            defines = (("ACTIVATION", self._activation), ("WRITE_Z", z), *traced)
            layer0 += load_kernels("fused/dispatch_gemm.cu", "dispatch_gemm", defines=defines)
            layer0[z].allow_shared(_LAYER0_BYTES)
        (layer1,) = load_kernels("fused/gemm_combine.cu", "gemm_combine", defines=traced)
        layer1.allow_shared(_LAYER1_BYTES)
        return FusedKernels(tuple(layer0), layer1)

    def layer0(self, call: ParamStruct, x_rows: Any, w_up: Any, z: Any, a: Any) -> None:
        """Pull x into its rows and multiply: a, and z unless it is None."""
        arguments = gemm_arguments(self._up_params, x_rows, w_up, a, z, gated=self._gated)
        kernel = self.kernels.layer0[z is not None]
        pace, num_comm = self._dispatch_link, self._num_comm0
        kernel(self.grid, THREADS, call, *arguments, pace, num_comm, shared_bytes=_LAYER0_BYTES)

    def layer1(self, call: ParamStruct, a: Any, w_down: Any, o: Any) -> None:
        """Multiply, push partial rows, and add up at home: waits for peers."""
        arguments = gemm_arguments(self._down_params, a, w_down, o, None, gated=False)
        pace, num_comm = self._combine_link, self._num_comm1
        self.kernels.layer1(
            self.grid, THREADS, call, *arguments, pace, num_comm, shared_bytes=_LAYER1_BYTES
        )


def num_comm_ctas(num_comm: int | None, grid: int) -> np.int32:
    """CTAs of a launch of `grid` whose movers work. Ranks may have grids of different size, so a
    config that asks for more than there are means all, and is no error."""
    return np.int32(grid if num_comm is None else min(num_comm, grid))
