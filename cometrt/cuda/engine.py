"""The grouped GEMM engine (kernels_cu/gemm): the GEMMs of all experts of a rank in one launch.

Work tiles follow the plan's order. Only the device knows how many rows each expert has.
"""

from __future__ import annotations

import functools
from typing import Protocol

import numpy as np

from cometrt.activations import ACTIVATIONS, is_gated
from cometrt.cuda.types import DeviceArray
from cometrt.kernels.constants import BLOCK_K, BLOCK_M, BLOCK_N, CLUSTER_SIZE
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
    best_raster_group,
    max_cluster_steps,
    num_n_tiles,
    work_tile_dtype,
)
from cometrt.world.partitions import gpu_sms, num_sms

_HALF_M = BLOCK_M // 2
_ORDER_CTAS = 8  # of the launch that orders tiles
_COUNTS = 3  # of a tile order: cluster steps; steps popped, clusters finished
_ALL_WEIGHTS = 2**31 - 1  # more than there are plan experts: each has its own weights


class PlannedTiles(Protocol):
    """The tables that the engine reads of a plan made with block_m = 128, on the device."""

    tile_order: DeviceArray
    num_tiles: DeviceArray
    tile_expert: DeviceArray
    expert_offsets: DeviceArray
    expert_rows: DeviceArray


class TileOrder:
    """Device memory for the tile order of a GEMM (see `cometrt.plan.tile_order`).

    Each pipeline chunk has an order of its own.

    Args:
        max_tiles: largest number of M-tiles.
        n_tiles: number of N-tiles.
        n_chunk, raster_group: N-tiles of an N-chunk and of a raster group; None: all.
        backwards: walk the dispatch order from its end.
        pipeline_chunks: number of pipeline chunks.
        more_steps: room for so many cluster steps of other GEMMs behind the order.
        num_weights: as for `make_tile_order`.

    Attributes:
        params: TileOrderParams, for the planner.
        counts: [3 * pipeline_chunks] int32: for each pipeline chunk its number of cluster steps,
            and the GEMM's two counters.
    """

    def __init__(
        self,
        max_tiles: int,
        n_tiles: int,
        *,
        n_chunk: int | None = None,
        raster_group: int | None = None,
        backwards: bool = False,
        pipeline_chunks: int = 1,
        more_steps: int = 0,
        num_weights: int | None = None,
    ) -> None:
        import cupy as cp

        sizes = max_tiles, n_tiles, n_chunk, pipeline_chunks, more_steps
        tile_bytes, counts = tile_order_size(*sizes)
        self._tiles, self.counts = cp.empty(tile_bytes, cp.uint8), cp.zeros(counts, cp.int32)
        self._chunk_bytes = tile_bytes // pipeline_chunks
        self.params = ParamStruct(tile_order_params_dtype)
        fields = self.params.fields
        for name, address in self.addresses().items():
            fields[name] = address
        fields["num_n_tiles"], fields["backwards"] = n_tiles, backwards
        self.walk(n_chunk, raster_group)
        fields["num_pipeline_chunks"] = pipeline_chunks
        fields["max_steps"] = self._chunk_bytes // (CLUSTER_SIZE * work_tile_dtype.itemsize)
        fields["num_weights"] = num_weights or _ALL_WEIGHTS

    def walk(self, n_chunk: int | None, raster_group: int | None) -> None:
        """Change the N-chunk and the raster group of orders to come. The memory must have room."""
        fields = self.params.fields
        n_tiles = int(fields["num_n_tiles"][0])
        fields["n_chunk"] = n_chunk or n_tiles
        fields["raster_group"] = min(raster_group or n_tiles, n_tiles)  # a wider one may not fit

    def addresses(self, pipeline_chunk: int = 0) -> dict[str, int]:
        """Addresses of a chunk's work tiles, of its number of steps, and of the GEMM's counters."""
        counts = self.counts.data.ptr + 4 * _COUNTS * pipeline_chunk
        tiles = self._tiles.data.ptr + self._chunk_bytes * pipeline_chunk
        return {"work_tiles": tiles, "num_steps": counts, "progress": counts + 4}

    def tiles(self, pipeline_chunk: int = 0) -> np.ndarray:
        """[cluster steps, 2] of work_tile_dtype; waits for the device."""
        steps = int(self.counts[_COUNTS * pipeline_chunk].get())
        found = self._tiles.get().view(work_tile_dtype).reshape(-1, CLUSTER_SIZE)
        first = pipeline_chunk * int(self.params.fields["max_steps"][0])
        return found[first : first + steps]


def tile_order_size(
    max_tiles: int, n_tiles: int, n_chunk: int | None, pipeline_chunks: int, more_steps: int = 0
) -> tuple[int, int]:
    """(bytes of work tiles, number of counts) of a `TileOrder`."""
    steps = max_cluster_steps(-(-max_tiles // pipeline_chunks), n_tiles, n_chunk) + more_steps
    tiles = CLUSTER_SIZE * pipeline_chunks * steps
    return tiles * work_tile_dtype.itemsize, _COUNTS * pipeline_chunks


def order_tiles(
    planned: PlannedTiles,
    n_tiles: int,
    *,
    n_chunk: int | None = None,
    raster_group: int | None = None,
    backwards: bool = False,
    pipeline_chunks: int = 1,
    num_weights: int | None = None,
) -> TileOrder:
    """`cometrt.plan.tile_order.make_tile_order` on the device, queued on the current stream.

    An order serves any number of GEMMs, one after the other. Arguments as for `TileOrder`.
    """
    order = TileOrder(
        len(planned.tile_order),
        n_tiles,
        n_chunk=n_chunk,
        raster_group=raster_group,
        backwards=backwards,
        pipeline_chunks=pipeline_chunks,
        num_weights=num_weights,
    )
    tables = ParamStruct(planned_tiles_dtype)
    for name in planned_tiles_dtype.names or ():
        tables.fields[name] = getattr(planned, name).data.ptr
    (kernel,) = load_kernels("scheduler/tile_order.cu", "tile_order")
    kernel(current_stream(), _ORDER_CTAS, order.params, tables)
    return order


def layer_orders(
    shape: PlanShape,
    *,
    n_chunk: int | None = None,
    pipeline_chunks: int = 1,
    block_n: tuple[int, int] = (BLOCK_N, BLOCK_N),
) -> tuple[TileOrder, TileOrder]:
    """Tile orders of a layer's up and down GEMM; n_chunk: N-tiles of the down GEMM's N-chunks."""
    up, down = layer_n_tiles(shape, block_n)
    up_group, down_group = layer_raster_groups(shape)
    num_weights = shape.geometry.num_weights
    return (
        TileOrder(
            shape.max_tiles,
            up,
            raster_group=up_group,
            pipeline_chunks=pipeline_chunks,
            num_weights=num_weights,
        ),
        TileOrder(
            shape.max_tiles,
            down,
            n_chunk=n_chunk,
            raster_group=down_group,
            backwards=True,
            pipeline_chunks=pipeline_chunks,
            num_weights=num_weights,
        ),
    )


def layer_raster_groups(shape: PlanShape) -> tuple[int, int]:
    """Raster groups of a layer's up and down GEMM, in N-tiles."""
    of_config, geometry = shape.config.raster_group, shape.geometry
    up, down = geometry.spec.hidden, geometry.local_intermediate
    return of_config or raster_group_of(up), of_config or raster_group_of(down)


def layer_n_tiles(
    shape: PlanShape, block_n: tuple[int, int] = (BLOCK_N, BLOCK_N)
) -> tuple[int, int]:
    """Number of N-tiles of a layer's up and down GEMM, whose tiles have so many columns."""
    geometry, spec = shape.geometry, shape.geometry.spec
    up = num_n_tiles(geometry.local_intermediate, gated=spec.gated, block_n=block_n[0])
    return up, num_n_tiles(spec.hidden, gated=False, block_n=block_n[1])


def raster_group_of(inner: int) -> int:
    """`best_raster_group` of the SMs that this thread's kernels run on; inner: K."""
    return best_raster_group(num_sms(), gpu_sms(), inner)


class GemmArguments:
    """Arguments of one GEMM's launches: out = act(a b[expert]^T).

    Args:
        order: tile order of the GEMM.
        rows, inner, columns, experts: a is [rows, inner], b is [experts, columns, inner].
        gated: b is [experts, 2 * columns, inner], the gate rows first.
        ok: address of a word that is 0 while the order is not valid; 0: it always is valid.
        pipeline_chunk: index of the pipeline chunk to compute.
        reads_weights_once: whether hardly any expert has rows of more than two M-tiles.
        block_n: columns of an N-tile.
    """

    def __init__(
        self,
        order: TileOrder,
        rows: int,
        inner: int,
        columns: int,
        experts: int,
        *,
        gated: bool = False,
        ok: int = 0,
        pipeline_chunk: int = 0,
        reads_weights_once: bool = False,
        block_n: int = BLOCK_N,
    ) -> None:
        self._params = ParamStruct(gemm_params_dtype)
        fields = self._params.fields
        fields["ok"], fields["reads_weights_once"] = ok, reads_weights_once
        for name, address in order.addresses(pipeline_chunk).items():
            fields[name] = address
        problem = fields["problems"][0, 0]
        problem["num_k_blocks"], problem["num_columns"] = -(-inner // BLOCK_K), columns
        halves, self._block_n = 2 if gated else 1, block_n
        self._a, self._b = (1, 1, rows, inner), (experts, halves, columns, inner)

    def __call__(self, a: int, b: int, out: int, z: int = 0) -> tuple[KernelArgument, ...]:
        """The parameter struct, and the tensor maps of a and b. All arrays by address."""
        uint64s = self._params.uint64s
        uint64s[_OUT], uint64s[_Z] = out, z
        return self._params, *_operand_maps(a, self._a, b, self._b, self._block_n)


class GroupedGemm:
    """out = act(a b[expert]^T) for the rows of each expert. bf16 in and out, fp32 accumulation.

    Args:
        activation: a name of cometrt.activations; None: no activation.
        write_z: also store z, the rounded input of the activation. out is computed from it.
    """

    def __init__(self, activation: str | None = None, *, write_z: bool = False) -> None:
        self.gated = activation is not None and is_gated(activation)
        self.kernel = gemm_kernel(activation, write_z)

    def num_n_tiles(self, b_rows: int) -> int:
        """N-tiles of a result, for `order_tiles`; b_rows: b's second extent."""
        return num_n_tiles(b_rows // 2 if self.gated else b_rows, gated=self.gated)

    def __call__(
        self,
        a: DeviceArray,
        b: DeviceArray,
        out: DeviceArray,
        order: TileOrder,
        *,
        z: DeviceArray | None = None,
        sms: int | None = None,
        pipeline_chunk: int = 0,
    ) -> None:
        """Queue it on the current stream.

        Args:
            a: [rows, K], padding rows zero.
            b: [E, N, K]; gated: [E, 2 * N, K], the gate rows first.
            out: [rows, N]; padding rows become act(0) = 0.
            order: tile order for `num_n_tiles(b.shape[1])` N-tiles.
            z: [rows, N or 2 * N], with write_z.
            sms: number of SMs to use; None: all.
            pipeline_chunk: index of the pipeline chunk to compute.
        """
        arguments = GemmArguments(
            order,
            a.shape[0],
            a.shape[1],
            out.shape[1],
            len(b),
            gated=self.gated,
            pipeline_chunk=pipeline_chunk,
        )
        addresses = a.data.ptr, b.data.ptr, out.data.ptr, 0 if z is None else z.data.ptr
        self.kernel(current_stream(), gemm_ctas(sms), *arguments(*addresses))


def gemm_ctas(sms: int | None = None) -> int:
    """Number of CTAs of a GEMM on so many SMs (None: all). It is even, since clusters have two."""
    return (num_sms() if sms is None else sms) // CLUSTER_SIZE * CLUSTER_SIZE


def gemm_kernel(activation: str | None, write_z: bool) -> Kernel:
    number = -1 if activation is None else list(ACTIVATIONS).index(activation)
    macros = (("ACTIVATION", number), ("WRITE_Z", int(write_z)))
    (kernel,) = load_kernels("gemm/grouped_gemm.cu", "grouped_gemm", macros=macros)
    return kernel


def current_stream() -> int:
    """CuPy's current stream, as a raw handle."""
    import cupy as cp

    return int(cp.cuda.get_current_stream().ptr)


@functools.lru_cache(maxsize=4096)
def _operand_maps(
    a: int, a_shape: tuple[int, ...], b: int, b_shape: tuple[int, ...], block_n: int
) -> tuple[KernelArgument, KernelArgument, KernelArgument]:
    """Tensor maps, from addresses: of a by M-tiles, of a by half M-tiles, and of b by half N-tiles.

    Cached, since a training loop's allocator returns the same addresses again.
    """
    return (
        encode(a, a_shape, (1, 1, BLOCK_M, BLOCK_K)),
        encode(a, a_shape, (1, 1, _HALF_M, BLOCK_K)),
        encode(b, b_shape, (1, 1, block_n // 2, BLOCK_K)),
    )


_OUT = ParamStruct(gemm_params_dtype).index_of("problems")  # the first problem's out, then its z
_Z = _OUT + 1
