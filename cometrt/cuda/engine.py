"""The grouped GEMM engine (kernels_cu/gemm): all experts of a rank in one launch, tiles in the
plan's order, group sizes known on the device alone."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, Protocol

import numpy as np

from cometrt.activations import ACTIVATIONS, is_gated
from cometrt.kernels.launch import Kernel, load_kernels
from cometrt.kernels.params import (
    KernelArgument,
    ParamStruct,
    gemm_params_dtype,
    planned_tiles_dtype,
    tile_order_params_dtype,
)
from cometrt.kernels.tensor_map import encode
from cometrt.plan import PlanShape
from cometrt.plan.tile_order import (
    BLOCK_M,
    best_raster_group,
    max_cluster_steps,
    num_n_tiles,
    work_tile_dtype,
)
from cometrt.world.partitions import gpu_sms, num_sms

_BLOCK_K, _HALF_M, _HALF_N = 64, BLOCK_M // 2, 128
THREADS = 384  # kThreads of gemm/tile.cuh
_ORDER_THREADS, _ORDER_BLOCKS = 1024, 8
SHARED_BYTES = 4 * 48 * 1024 + 8 * 1024 + 2 * 16 + 12 * 8  # sizeof(Shared) of gemm/tile.cuh


class Tiles(Protocol):
    """What the engine reads of a Plan made with block_m = 128; arrays on the device."""

    tile_order: Any
    num_tiles: Any
    tile_expert: Any
    expert_offsets: Any
    expert_rows: Any


class TileOrder(NamedTuple):
    """The order of a GEMM's tiles; see cometrt.plan.tile_order. In parts, each has its own."""

    items: Any  # [parts * most, 2] of work_tile_dtype, as bytes
    counts: Any  # [parts * 3] int32: turns; dealt, and clusters that have finished: 0 between uses
    num_pipeline_chunks: int = 1

    def part(self, index: int) -> TileOrder:
        size = self.items.size // self.num_pipeline_chunks
        items = self.items[index * size : (index + 1) * size]
        return TileOrder(items, self.counts[3 * index : 3 * index + 3])


def new_tile_order(
    max_tiles: int, num_columns: int, n_chunk: int | None = None, *, parts: int = 1
) -> TileOrder:
    """Memory for the turns of up to that many M-tiles and that many column tiles."""
    import cupy as cp

    item_bytes, num_counts = tile_order_size(max_tiles, num_columns, n_chunk, parts=parts)
    return TileOrder(cp.empty(item_bytes, cp.uint8), cp.zeros(num_counts, cp.int32), parts)


def tile_order_size(
    max_tiles: int, num_columns: int, n_chunk: int | None = None, *, parts: int = 1
) -> tuple[int, int]:
    """(bytes of items, number of counts) of `new_tile_order`."""
    items = 2 * parts * max_cluster_steps(-(-max_tiles // parts), num_columns, n_chunk)
    return items * work_tile_dtype.itemsize, 3 * parts


def layer_n_tiles(shape: PlanShape) -> tuple[int, int]:
    """Column tiles of the up and of the down GEMM of a layer."""
    geometry, spec = shape.geometry, shape.geometry.spec
    up = num_n_tiles(geometry.local_intermediate, gated=spec.gated)
    return up, num_n_tiles(spec.hidden, gated=False)


def tile_order_params(
    turns: TileOrder,
    num_columns: int,
    *,
    backwards: bool = False,
    n_chunk: int | None = None,
    raster_group: int | None = None,
) -> ParamStruct:
    """TurnsParams; arguments as for `order_tiles`."""
    record = ParamStruct(tile_order_params_dtype)
    _set_order(record.fields, turns)
    record.fields["num_n_tiles"], record.fields["backwards"] = num_columns, backwards
    record.fields["n_chunk"] = n_chunk or num_columns
    turn_bytes = 2 * work_tile_dtype.itemsize
    record.fields["num_pipeline_chunks"] = turns.num_pipeline_chunks
    record.fields["max_steps"] = turns.items.size // turns.num_pipeline_chunks // turn_bytes
    record.fields["raster_group"] = raster_group or num_columns
    return record


def order_tiles(tiles: Tiles, num_columns: int, **how: Any) -> TileOrder:
    """`cometrt.plan.tile_order.make_tile_order` on the device, queued on the current stream.

    TileOrder serve any number of GEMMs, one after the other.

    Args:
        how: backwards, n_chunk and raster_group, as in `make_tile_order`; parts: how many, each of which is a
            `TileOrder.part`.
    """
    parts = how.pop("parts", 1)
    turns = new_tile_order(len(tiles.tile_order), num_columns, how.get("n_chunk"), parts=parts)
    record = tile_order_params(turns, num_columns, **how)
    tables = ParamStruct(planned_tiles_dtype)
    for name in "tile_order num_tiles tile_expert expert_offsets expert_rows".split():
        tables.fields[name] = getattr(tiles, name).data.ptr
    (kernel,) = load_kernels("scheduler/tile_order.cu", "tile_order")
    kernel((_ORDER_BLOCKS,), _ORDER_THREADS, record, tables)
    return turns


def raster_group_of(inner: int) -> int:
    """`best_raster_group` of the SMs that this thread's kernels run on; inner: K."""
    return best_raster_group(num_sms(), gpu_sms(), inner)


def layer_raster_groups(shape: PlanShape) -> tuple[int, int]:
    """Column tiles of a group in the up and in the down GEMM of a layer."""
    geometry, group = shape.geometry, shape.config.raster_group
    up, down = (raster_group_of(k) for k in (geometry.spec.hidden, geometry.local_intermediate))
    return (group or up, group or down)


def _set_order(params: np.ndarray, turns: TileOrder) -> None:
    counts = turns.counts.data.ptr
    params["work_tiles"], params["num_steps"] = turns.items.data.ptr, counts
    params["progress"] = counts + 4


class GroupedGemm:
    """out = act(a b[expert]^T), row by row; bf16 operands and results, fp32 accumulation.

    Args:
        activation: of cometrt.activations, or None for none.
        write_z: also write what the activation is applied to (rounded; out has its bits).
        ok: as for `new_gemm_params`.
    """

    def __init__(
        self, activation: str | None = None, *, write_z: bool = False, ok: int = 0
    ) -> None:
        self._ok = ok
        self.gated = activation is not None and is_gated(activation)
        self._kernel = _kernel(activation, write_z)

    def num_n_tiles(self, b_rows: int) -> int:
        """N-tiles of a result, for `order_tiles`; b_rows: b's second extent."""
        return num_n_tiles(b_rows // 2 if self.gated else b_rows, gated=self.gated)

    def __call__(
        self, a: Any, b: Any, out: Any, turns: TileOrder, *, z: Any = None, sms: int | None = None
    ) -> None:
        """Queue it on the current stream.

        Args:
            a: [rows, K], padding zero.
            b: [E, N, K]; gated: [E, 2 * N, K], the gate rows first.
            out: [rows, N]; padding become act(0) = 0.
            z: [rows, N or 2 * N], where write_z.
            sms: how many take part; None: all.
        """
        params = new_gemm_params(turns, a.shape[1], out.shape[1], self._ok)
        arguments = gemm_arguments(params, a, b, out, z, gated=self.gated)
        self._kernel(gemm_grid(sms), THREADS, *arguments, shared_bytes=SHARED_BYTES)


def gemm_grid(sms: int | None = None) -> tuple[int]:
    """That many SMs, or all; CTAs come in pairs."""
    return ((num_sms() if sms is None else sms) // 2 * 2,)


def new_gemm_params(turns: TileOrder, inner: int, columns: int, ok: int = 0) -> ParamStruct:
    """GemmParams but for pointers of matrices; inner: K; ok: address of a word that is 0 where the
    turns are not valid, or 0: they always are."""
    record = ParamStruct(gemm_params_dtype)
    record.fields["ok"] = ok
    _set_order(record.fields, turns)
    problem = record.fields["problems"][0, 0]
    problem["num_k_blocks"], problem["num_columns"] = -(-inner // _BLOCK_K), columns
    return record


def gemm_arguments(
    params: ParamStruct, a: Any, b: Any, out: Any, z: Any, *, gated: bool
) -> tuple[KernelArgument, ...]:
    """`params`, pointing to out and z, and the tensor maps of a, its halves, and b; matrices as
    for `GroupedGemm`."""
    words = params.words
    words[_OUT] = out.data.ptr
    words[_Z] = 0 if z is None else z.data.ptr
    return params, *_operand_maps(a.data.ptr, a.shape, b.data.ptr, b.shape, gated)


@functools.lru_cache(maxsize=4096)
def _operand_maps(
    a: int, a_shape: tuple[int, int], b: int, b_shape: tuple[int, int, int], gated: bool
) -> tuple[KernelArgument, KernelArgument, KernelArgument]:
    """Of a, its halves, and b; kept, since memory of a call comes back in later ones."""
    (rows, inner), (experts, b_rows, _) = a_shape, b_shape
    parts = 2 if gated else 1
    of_b = (experts, parts, b_rows // parts, inner)
    return (
        encode(a, (1, 1, rows, inner), (1, 1, BLOCK_M, _BLOCK_K)),
        encode(a, (1, 1, rows, inner), (1, 1, _HALF_M, _BLOCK_K)),
        encode(b, of_b, (1, 1, _HALF_N, _BLOCK_K)),
    )


_OUT = ParamStruct(gemm_params_dtype).place("problems")  # of the first: out, z
_Z = _OUT + 1


def _kernel(activation: str | None, write_z: bool) -> Kernel:
    number = -1 if activation is None else list(ACTIVATIONS).index(activation)
    defines = (("ACTIVATION", number), ("WRITE_Z", int(write_z)))
    (kernel,) = load_kernels("gemm/grouped_gemm.cu", "grouped_gemm", defines=defines)
    kernel.allow_shared(SHARED_BYTES)
    return kernel
