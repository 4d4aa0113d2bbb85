"""Weight gradients of all experts in one launch of the engine (gemm/grouped_wgrad.cu)."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from cometrt.cuda.dgrad import MN_MAJOR_BOX
from cometrt.cuda.engine import current_stream, gemm_ctas
from cometrt.cuda.types import DeviceArray
from cometrt.kernels.constants import BLOCK_M, BLOCK_N, CLUSTER_SIZE
from cometrt.kernels.launch import load_kernels
from cometrt.kernels.params import MAX_WGRADS, KernelArgument, ParamStruct, wgrad_params_dtype
from cometrt.kernels.tensor_map import encode
from cometrt.plan.tile_order import work_tile_dtype
from cometrt.world.partitions import num_sms

_COUNTS = 3  # of a tile order: cluster steps; steps popped, clusters finished


class WgradOrder:
    """Device memory for the tile order of weight gradients: expert by expert, most rows first.

    Args:
        num_experts: E.
        shapes: (M, N) of each gradient that an expert has.

    Attributes:
        counts: [3] int32: number of cluster steps, and the GEMM's two counters.
    """

    def __init__(self, num_experts: int, shapes: Sequence[tuple[int, int]]) -> None:
        import cupy as cp

        tile_bytes, counts = wgrad_order_size(num_experts, shapes)
        self._tiles, self.counts = cp.empty(tile_bytes, cp.uint8), cp.zeros(counts, cp.int32)

    def addresses(self) -> dict[str, int]:
        """Addresses of the work tiles, of the number of steps, and of the GEMM's counters."""
        counts = int(self.counts.data.ptr)
        return {
            "work_tiles": int(self._tiles.data.ptr),
            "num_steps": counts,
            "progress": counts + 4,
        }

    def tiles(self) -> np.ndarray:
        """[cluster steps, 2] of work_tile_dtype; waits for the device."""
        found = self._tiles.get().view(work_tile_dtype).reshape(-1, CLUSTER_SIZE)
        return found[: int(self.counts[0].get())]


def wgrad_order_size(num_experts: int, shapes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """(bytes of work tiles, number of counts) of a `WgradOrder`."""
    steps = max_wgrad_steps(num_experts, shapes)
    return CLUSTER_SIZE * steps * work_tile_dtype.itemsize, _COUNTS


def max_wgrad_steps(num_experts: int, shapes: Sequence[tuple[int, int]]) -> int:
    """Number of cluster steps of all experts' gradients."""
    return num_experts * sum(num_wgrad_steps(*shape) for shape in shapes)


def num_wgrad_steps(rows: int, columns: int) -> int:
    """Number of cluster steps of one expert's gradient [rows, columns]; any raster group."""
    m_tiles, n_tiles = -(-rows // BLOCK_M), -(-columns // BLOCK_N)
    return m_tiles // 2 * n_tiles + m_tiles % 2 * -(-n_tiles // 2)


def wgrad_raster_group(sms: int) -> int:
    """N-tiles of a raster group, for a launch on so many SMs.

    A cluster step is 256 x 256: two M-tiles by one N-tile. The steps that all clusters compute at
    the same time form about a square, so that they share as many operands as possible.
    """
    return max(2, math.isqrt(sms // 2) // 2 * 2)


class WgradAddresses(NamedTuple):
    """One weight's gradient: out[e] = a_e^T b_e over the rows of expert e. Arrays by address."""

    a: int  # [rows, M] bf16
    b: int  # [rows, N] bf16
    out: int  # [E, M, N] bf16 or float32
    is_float32: bool


class TileList(Protocol):
    """A tile order in device memory: a `WgradOrder`, or a `TileOrder` with room behind it."""

    def addresses(self) -> dict[str, int]: ...


class WgradArguments:
    """Kernel arguments for the gradients of one or two weights: of the GEMM and of its tile order.

    Args:
        order: memory for the tile order.
        rows: number of rows of every operand.
        shapes: (M, N) of each gradient.
        num_experts: E.
        row_sets: K of an expert is its rows in each of so many row sets, one after the other.
        raster_group: N-tiles that all M-tiles of an expert take before the next ones; even.
        ok: address of a word that is 0 where the plan is not valid; 0: it always is.
    """

    def __init__(
        self,
        order: TileList,
        rows: int,
        shapes: Sequence[tuple[int, int]],
        num_experts: int,
        *,
        row_sets: int = 1,
        raster_group: int,
        ok: int = 0,
    ) -> None:
        self._rows, self._shapes, self._num_experts = rows, tuple(shapes), num_experts
        self._params = ParamStruct(wgrad_params_dtype)
        fields = self._params.fields
        for name, address in order.addresses().items():
            fields[name] = address
        fields["ok"], fields["raster_group"] = ok, raster_group
        fields["num_problems"], fields["num_experts"] = len(shapes), num_experts
        fields["row_sets"] = row_sets
        for problem, shape in zip(fields["problems"][0], shapes, strict=False):
            problem["num_rows"], problem["num_columns"] = shape
            problem["expert_stride"] = shape[0]

    def params(
        self,
        expert_offsets: int,
        expert_rows: int,
        wgrads: Sequence[WgradAddresses],
        *,
        accumulate: bool,
    ) -> ParamStruct:
        """WgradParams, for the GEMM and for the kernel that orders its tiles.

        Args:
            expert_offsets, expert_rows: addresses of the plan's tables, by plan expert.
            wgrads: one for each of `shapes`.
            accumulate: add to the old values of `out`.
        """
        fields = self._params.fields
        fields["expert_offsets"], fields["expert_rows"] = expert_offsets, expert_rows
        fields["accumulate"] = accumulate
        for problem, wgrad in zip(fields["problems"][0], wgrads, strict=False):
            problem["out"], problem["is_float32"] = wgrad.out, wgrad.is_float32
        return self._params

    def maps(self, wgrads: Sequence[WgradAddresses]) -> KernelArgument:
        """WgradMaps: the tensor maps of all operands and results."""
        operands = [
            (address, self._rows, columns)
            for wgrad, shape in zip(wgrads, self._shapes, strict=True)
            for address, columns in zip((wgrad.a, wgrad.b), shape, strict=True)
        ]
        outs = [
            (wgrad.out, self._num_experts * rows, columns, 4 if wgrad.is_float32 else 2)
            for wgrad, (rows, columns) in zip(wgrads, self._shapes, strict=True)
        ]
        return _wgrad_maps(tuple(operands), tuple(outs))


@functools.lru_cache(maxsize=4096)
def _wgrad_maps(
    operands: tuple[tuple[int, int, int], ...], outs: tuple[tuple[int, int, int, int], ...]
) -> KernelArgument:
    """WgradMaps.

    Args:
        operands: (address, rows, columns) of the first problem's a and b, then of the next one's.
        outs: (address, rows, columns, bytes of an element) of each problem's result.
    """
    maps = [encode(address, (1, 1, *shape), MN_MAJOR_BOX).value for address, *shape in operands]
    a, b, out = maps[0::2], maps[1::2], [_out_map(*of) for of in outs]
    unused = [maps[0]] * (MAX_WGRADS - len(a))
    return KernelArgument(np.concatenate([*a, *unused, *b, *unused, *out, *unused]))


def _out_map(address: int, rows: int, columns: int, element_bytes: int) -> np.ndarray:
    """Tensor map of a result in boxes of 16 rows by 128 bytes.

    A box has eight rows in the order 0, 4, 1, 5, 2, 6, 3, 7: OutBox in
    kernels_cu/gemm/wgrad_epilogue.cuh says why.
    """
    shape, strides = (rows // 8, 4, 2, columns), (8 * columns, columns, 4 * columns)
    box = (2, 4, 2, 128 // element_bytes)
    return encode(address, shape, box, element_bytes=element_bytes, strides=strides).value


class Wgrad(NamedTuple):
    """One weight's gradient, as arrays: see `WgradAddresses`."""

    a: DeviceArray
    b: DeviceArray
    out: DeviceArray


class ExpertRows(Protocol):
    """The tables of a plan that weight gradients read."""

    expert_offsets: DeviceArray
    expert_rows: DeviceArray


class GroupedWgrad:
    """Weight gradients of all experts, in bf16 or float32, accumulated in fp32.

    K is an expert's rows, rounded up to a multiple of 64. Padding rows up to there must be zero in
    both operands; later ones are not read. Experts without rows get zeros.
    """

    def __init__(self) -> None:
        self._kernel, order = load_kernels("gemm/grouped_wgrad.cu", "grouped_wgrad", "wgrad_order")
        self._order = order.with_shared(0)

    def ordered(
        self,
        wgrads: Sequence[Wgrad],
        tiles: ExpertRows,
        order: WgradOrder | None = None,
        *,
        accumulate: bool = False,
        raster_group: int | None = None,
        row_sets: int = 1,
        sms: int | None = None,
    ) -> Callable[[], None]:
        """Queue the tile order on the current stream; what queues the GEMMs, as often as wanted.

        Args:
            wgrads: one or two.
            tiles: the plan's tables.
            order: memory for the tile order; None: it is allocated.
            accumulate: add to the old values of `out`, rounding once. Experts without rows keep
                theirs.
            raster_group: as for `WgradArguments`; None: `wgrad_raster_group` of the SMs.
            row_sets: of the plan, which has as many plan experts for each expert.
            sms: number of SMs to use; None: all.
        """
        experts, rows = len(tiles.expert_rows) // row_sets, wgrads[0].a.shape[0]
        shapes = [(w.a.shape[1], w.b.shape[1]) for w in wgrads]
        group = raster_group or wgrad_raster_group(num_sms() if sms is None else sms)
        order = order or WgradOrder(experts, shapes)
        arguments = WgradArguments(
            order, rows, shapes, experts, row_sets=row_sets, raster_group=group
        )
        addresses = [
            WgradAddresses(w.a.data.ptr, w.b.data.ptr, w.out.data.ptr, w.out.dtype.itemsize == 4)
            for w in wgrads
        ]
        tables = tiles.expert_offsets.data.ptr, tiles.expert_rows.data.ptr
        params = arguments.params(*tables, addresses, accumulate=accumulate)
        self._order(current_stream(), experts, params)
        maps, kept = arguments.maps(addresses), (order, wgrads, tiles)

        def run(_kept: object = kept) -> None:
            self._kernel(current_stream(), gemm_ctas(sms), params, maps)

        return run
