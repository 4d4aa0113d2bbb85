"""The grouped GEMM engine's backward forms (kernels_cu/gemm/grouped_dgrad.cu, grouped_wgrad.cu):
all experts of a rank in one launch, group sizes known on the device alone."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from cometrt.cuda.engine import (
    SHARED_BYTES,
    THREADS,
    TileOrder,
    Tiles,
    gemm_grid,
    new_gemm_params,
)
from cometrt.kernels.launch import load_kernels
from cometrt.kernels.params import KernelArgument, ParamStruct
from cometrt.kernels.tensor_map import encode
from cometrt.plan.tile_order import BLOCK_M, BLOCK_N, num_n_tiles, work_tile_dtype
from cometrt.world.partitions import num_sms

_BLOCK_K, _HALF_M = 64, BLOCK_M // 2
_BOX = (1, 1, _BLOCK_K, 64)  # of operands whose K is not innermost
_ORDER_THREADS = 256  # kOrderThreads of grouped_wgrad.cu
_MAX_WGRADS = 2  # kMaxWgrads of gemm/wgrad_problem.cuh

wgrad_problem_dtype = np.dtype(
    [("out", np.uint64), ("num_rows", np.int32), ("num_columns", np.int32)]
)
wgrad_params_dtype = np.dtype(
    [(name, np.uint64) for name in "work_tiles num_steps progress ok".split()]
    + [(name, np.uint64) for name in "expert_offsets expert_rows".split()]
    + [("problems", wgrad_problem_dtype, (_MAX_WGRADS,))]
    + [(name, np.int32) for name in "num_problems num_experts raster_group accumulate".split()]
)


class GroupedDgrad:
    """out = a b[expert], row by row; bf16 operands and results, fp32 accumulation.

    Args:
        ok: as for `new_gemm_params`.
    """

    def __init__(self, *, ok: int = 0) -> None:
        self._ok = ok
        (self._kernel,) = load_kernels("gemm/grouped_dgrad.cu", "grouped_dgrad")
        self._kernel.allow_shared(SHARED_BYTES)

    @staticmethod
    def num_n_tiles(columns: int) -> int:
        """N-tiles of a result of that many columns, for `order_tiles`."""
        return num_n_tiles(columns, gated=False)

    def __call__(
        self, a: Any, b: Any, out: Any, order: TileOrder, *, sms: int | None = None
    ) -> None:
        """Queue it on the current stream.

        Args:
            a: [rows, K]; padding rows zero.
            b: [E, K, N].
            out: [rows, N]; padding rows become zero.
            order: of `order_tiles`, for `num_n_tiles(N)`.
            sms: how many take part; None: all.
        """
        params = new_gemm_params(order, a.shape[1], out.shape[1], self._ok)
        params.fields["problems"]["out"] = out.data.ptr
        maps = _dgrad_maps(a.data.ptr, a.shape, b.data.ptr, b.shape)
        self._kernel(gemm_grid(sms), THREADS, params, *maps, shared_bytes=SHARED_BYTES)


@functools.lru_cache(maxsize=4096)
def _dgrad_maps(
    a: int, a_shape: tuple[int, int], b: int, b_shape: tuple[int, int, int]
) -> tuple[KernelArgument, KernelArgument, KernelArgument]:
    """Of a, its halves, and boxes of b."""
    return (
        encode(a, (1, 1, *a_shape), (1, 1, BLOCK_M, _BLOCK_K)),
        encode(a, (1, 1, *a_shape), (1, 1, _HALF_M, _BLOCK_K)),
        encode(b, (1, *b_shape), _BOX),
    )


class Wgrad(NamedTuple):
    """One weight's gradient: out[e] = a_e^T b_e, over the rows of expert e."""

    a: Any  # [rows, M] bf16
    b: Any  # [rows, N] bf16
    out: Any  # [E, M, N] bf16


class GroupedWgrad:
    """Weight gradients of all experts in one launch, those with the most rows first.

    K goes on to the next multiple of 64 behind an expert's rows. Padding rows up to there must be
    zero in both operands; those behind are not read. Experts without rows get zeros.

    Args:
        ok: as for `new_gemm_params`.
    """

    def __init__(self, *, ok: int = 0) -> None:
        self._ok = ok
        self._kernel, self._order = load_kernels(
            "gemm/grouped_wgrad.cu", "grouped_wgrad", "wgrad_order"
        )
        self._kernel.allow_shared(SHARED_BYTES)

    def __call__(
        self,
        wgrads: Sequence[Wgrad],
        tiles: Tiles,
        order: TileOrder | None = None,
        *,
        raster_group: int | None = None,
        sms: int | None = None,
    ) -> None:
        """Queue it on the current stream: the order of the tiles, then the GEMMs.

        Args:
            wgrads: one or two.
            tiles: the plan of the rows.
            order: memory for the order, of `new_wgrad_order`; None: it is allocated.
            raster_group: N-tiles that all M-tiles of an expert take before the next ones; even.
                None: chosen for the SMs.
            sms: how many take part; None: all.
        """
        experts = len(tiles.expert_rows)
        group = raster_group or wgrad_raster_group(num_sms() if sms is None else sms)
        shapes = [w.out.shape[1:] for w in wgrads]
        order = order or new_wgrad_order(experts, shapes)
        params = ParamStruct(wgrad_params_dtype)
        fields, counts = params.fields, order.counts.data.ptr
        fields["work_tiles"], fields["num_steps"] = order.items.data.ptr, counts
        fields["progress"], fields["ok"] = counts + 4, self._ok
        fields["expert_offsets"] = tiles.expert_offsets.data.ptr
        fields["expert_rows"] = tiles.expert_rows.data.ptr
        for problem, wgrad in zip(fields["problems"][0], wgrads, strict=False):
            problem["out"] = wgrad.out.data.ptr
            problem["num_rows"], problem["num_columns"] = wgrad.out.shape[1:]
        fields["num_problems"], fields["num_experts"] = len(wgrads), experts
        fields["raster_group"] = group
        pointers = tuple((x.data.ptr, x.shape) for w in wgrads for x in (w.a, w.b))
        self._order((experts,), _ORDER_THREADS, params)
        maps = _wgrad_maps(pointers)
        self._kernel(gemm_grid(sms), THREADS, params, maps, shared_bytes=SHARED_BYTES)


def wgrad_raster_group(sms: int) -> int:
    """N-tiles of a raster group. What all clusters compute at a time is about as high as wide: a
    cluster's step is two M-tiles by one N-tile, 256 by 256."""
    return max(2, math.isqrt(sms // 2) // 2 * 2)


def num_wgrad_steps(rows: int, columns: int) -> int:
    """Most cluster steps of one expert's gradient [rows, columns], for any raster group."""
    m_tiles, n_tiles = -(-rows // BLOCK_M), -(-columns // BLOCK_N)
    return m_tiles // 2 * n_tiles + m_tiles % 2 * -(-n_tiles // 2)


def new_wgrad_order(num_experts: int, shapes: Sequence[tuple[int, int]]) -> TileOrder:
    """Memory for the tile order of gradients [num_experts, *shape], one for each shape."""
    import cupy as cp

    steps = num_experts * sum(num_wgrad_steps(*shape) for shape in shapes)
    items = cp.empty(2 * steps * work_tile_dtype.itemsize, cp.uint8)
    return TileOrder(items, cp.zeros(3, cp.int32))


@functools.lru_cache(maxsize=4096)
def _wgrad_maps(operands: tuple[tuple[int, tuple[int, int]], ...]) -> KernelArgument:
    """WgradMaps of (address, shape) of each problem's a and b."""
    maps = [encode(pointer, (1, 1, *shape), _BOX).value for pointer, shape in operands]
    a, b = maps[0::2], maps[1::2]
    unused = [maps[0]] * (_MAX_WGRADS - len(a))
    return KernelArgument(np.concatenate([*a, *unused, *b, *unused]))
