"""The device planner: the plan of `cometrt.plan.reference`, bit for bit, on the GPU.

One launch, without waiting on the host. It also finds wrong routing, and leaves it in PlanProgress.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from cometrt.cuda.engine import current_stream
from cometrt.cuda.types import DeviceArray
from cometrt.kernels.constants import PLAN_BLOCKS_PER_SM, PLAN_TEAMS, TOKEN_TILE
from cometrt.kernels.launch import Macros, load_kernels
from cometrt.kernels.params import (
    PLAN_KEPT,
    PLAN_OUTPUTS,
    PLAN_SHARED,
    KernelArgument,
    ParamStruct,
    geometry_params,
    plan_params_dtype,
    plan_progress_dtype,
    shared_tables_dtype,
)
from cometrt.plan import Plan, PlanShape
from cometrt.plan.tables import plan_table_shapes
from cometrt.world.partitions import num_sms

_SM_BYTES = 228 * 1024  # of shared memory
_BLOCK_BYTES = 5632  # that a block takes besides its tables: static and reserved ones
_SMALL_BYTES = 224 * 1024  # of shared memory that the tables of a small plan may take
_SMALL_PAIRS = 8192  # that one block plans faster than a grid, whose barriers take longer
_PLACED_WORDS = 8 * TOKEN_TILE  # of the PlacedRuns of a team
FLAGS = tuple(KernelArgument(np.int32(flag)) for flag in (False, True))
_ALIGNMENT = 64  # words of a table: a bulk copy's, and a cache line's


def _offsets(words: dict[str, int], begin: int = 0) -> tuple[dict[str, int], int]:
    """First word of each array, one behind the other and aligned, and the end of the last."""
    offsets, end = {}, begin
    for name, count in words.items():
        offsets[name] = end
        end += -(-count // _ALIGNMENT) * _ALIGNMENT
    return offsets, end


def table_layout(shapes: dict[str, tuple[int, ...]]) -> tuple[dict[str, int], int]:
    """First word of each table in a plan's memory, and of row_weight, which is the last."""
    others = [name for name in shapes if name not in (*PLAN_KEPT, "row_weight")]
    names = (*PLAN_KEPT, *others, "row_weight")
    offsets, _ = _offsets({name: math.prod(shapes[name]) for name in names})
    return offsets, offsets["row_weight"]


def _blocks_per_sm(shared_bytes: int) -> int:
    """Blocks that an SM holds at once; more would find nothing to do."""
    return max(1, min(PLAN_BLOCKS_PER_SM, _SM_BYTES // (shared_bytes + _BLOCK_BYTES)))


def is_small(shape: PlanShape) -> bool:
    """Whether one block makes the plans. It depends on max_tokens: only the device knows how many
    tokens the other ranks have."""
    pairs = shape.global_tokens * shape.geometry.spec.topk
    items = shape.geometry.size * math.ceil(shape.geometry.spec.max_tokens / TOKEN_TILE)
    return pairs <= _SMALL_PAIRS and items <= 2 * PLAN_TEAMS and fits_in_shared(shape)


def fits_in_shared(shape: PlanShape) -> bool:
    """Whether one block's shared memory holds all tables that the planner's steps read again."""
    return shared_tables(shape)[1] <= _SMALL_BYTES


def shared_tables(shape: PlanShape) -> tuple[ParamStruct, int]:
    """The SharedTables of a small plan, and their bytes."""
    counters = {name: words for name, words in _counter_words(shape).items() if name != "progress"}
    scratch = _scratch_words(shape)
    zero, end = _offsets(counters | {"run_counts": scratch["run_counts"]})
    tables = plan_table_shapes(shape)
    kept, kept_end = _offsets({name: math.prod(tables[name]) for name in PLAN_KEPT}, end)
    routing = {name: math.prod(size) for name, size in planner_routing(shape).items()}
    rest = {name: (routing | scratch)[name] for name in PLAN_SHARED if name not in zero}
    others, others_end = _offsets(rest, kept_end)
    team_words = -(-max(_shared_words(shape), _PLACED_WORDS) // 4) * 4
    words = {
        **{name: (zero | others)[name] for name in PLAN_SHARED},
        **{field: kept[name] for name, field in PLAN_OUTPUTS if name in kept},
        "zero_bytes": end,
        "kept_bytes": kept_end - end,
        "team": others_end,
        "team_bytes": team_words,
    }
    record = ParamStruct(shared_tables_dtype)
    for name, count in words.items():
        record.fields[name] = 4 * count
    return record, 4 * (others_end + PLAN_TEAMS * team_words)


def _counter_words(shape: PlanShape) -> dict[str, int]:
    """32-bit words of each array that must be zero when the kernel begins."""
    geometry = shape.geometry
    words = {
        "progress": plan_progress_dtype.itemsize // 4,
        "counts": geometry.size * geometry.spec.num_experts,
        "token_counts": geometry.size * geometry.ep,
    }
    return {name: -(-count // 4) * 4 for name, count in words.items()}


def planner_scratch(shape: PlanShape, small: bool | None = None) -> dict[str, int]:
    """32-bit words of each array that DevicePlanner keeps for itself. A small plan's lie in shared
    memory, but for the one that later kernels read."""
    small = is_small(shape) if small is None else small
    words = _scratch_words(shape)
    return {name: words[name] for name in words if not small or name not in PLAN_SHARED}


def _scratch_words(shape: PlanShape) -> dict[str, int]:
    geometry, spec = shape.geometry, shape.geometry.spec
    size, experts = geometry.size, geometry.local_experts
    return {
        "token_tile_counts": size * math.ceil(spec.max_tokens / TOKEN_TILE) * spec.num_experts,
        "list_start": spec.num_experts,
        "pair_list": spec.max_tokens * spec.topk,
        "rank_rows": size * (size + 1) * experts,
        "rank_num_tiles": size,
        "rank_order": size * shape.max_tiles,
        "rank_tile_order_idx": size * shape.max_tiles,
        "run_counts": 2 * size * shape.max_tiles,
        "run_starts": 2 * size * shape.max_tiles,
        "column_tokens": 2 * size,
        "block_order_idx": size * shape.blocks_per_home,
        "first_order_idx": 2 * shape.global_tokens,
    }


def planner_routing(shape: PlanShape) -> dict[str, tuple[int, ...]]:
    """Shapes of DevicePlanner's copies of all ranks' routing, of 32-bit elements."""
    size, spec = shape.geometry.size, shape.geometry.spec
    pairs = (size, spec.max_tokens, spec.topk)
    return {"ids": pairs, "weights": pairs, "num_tokens": (size,)}


def table_words(shape: PlanShape) -> int:
    """32-bit words of a plan's memory."""
    return table_layout(plan_table_shapes(shape))[1] + shape.capacity


def planner_counters(shape: PlanShape) -> int:
    """32-bit words of DevicePlanner's `counters`."""
    return sum(_counter_words(shape).values())


def _shared_words(shape: PlanShape) -> int:
    """Shared memory of the step that takes most: place_rows, make_tiles or make_bases."""
    geometry, spec = shape.geometry, shape.geometry.spec
    num_phases = len(shape.config.last_distances(geometry.size))
    return max(
        (5 + spec.tp) * spec.num_experts + TOKEN_TILE * geometry.size,
        (geometry.size + num_phases + 2) * geometry.local_experts,
        geometry.size * geometry.ep,
    )


class DevicePlanner:
    """Plans one layer's exchanges on the current device; scratch memory is its own.

    Args:
        counters: [planner_counters(shape)] uint32, zero whenever `prepare` begins.
        macros: that the kernels are compiled with.
        small: whether one block plans; None: as `is_small` says.

    Attributes:
        fills_gpu: whether `prepare` takes all SMs, and not one block alone.
        ids, weights: [W, max_tokens, K], all ranks' routing in the last forward. A small plan
            leaves them there only where the routing is wrong.
        progress: PlanProgress of the last plan, as bytes.
        scratch: array by name; see `planner_scratch`.
        block_order_idx: address of that array.
        table_offsets: byte offset of each table within a plan's memory, by name.
    """

    def __init__(
        self,
        shape: PlanShape,
        counters: DeviceArray,
        macros: Macros = (),
        *,
        small: bool | None = None,
    ) -> None:
        import cupy as cp

        self._shape, self._counters = shape, counters
        self._small = is_small(shape) if small is None else small
        self.fills_gpu = not self._small
        lengths = planner_scratch(shape, self._small)
        self.scratch = {name: cp.empty(length, cp.int32) for name, length in lengths.items()}
        self.block_order_idx = int(self.scratch["block_order_idx"].data.ptr)
        arrays, begin = dict(self.scratch), 0
        for name, words in _counter_words(shape).items():
            arrays[name] = counters[begin : begin + words]
            begin += words
        self.progress = arrays["progress"].view(cp.uint8)
        routing = planner_routing(shape)
        self.ids = cp.empty(routing["ids"], cp.int32)
        self.weights = cp.empty(routing["weights"], cp.float32)
        self._num_tokens = cp.zeros(routing["num_tokens"], cp.int32)
        self._shapes = plan_table_shapes(shape)
        offsets, num_words = table_layout(self._shapes)
        self.table_offsets = {name: 4 * words for name, words in offsets.items()}
        shared_bytes = 4 * _shared_words(shape)
        self._grid = _blocks_per_sm(shared_bytes) * num_sms()
        source, names = "plan/plan.cu", "plan prepare".split()
        if self._small:
            source, names = "plan/plan_small.cu", "plan_small prepare_small pad".split()
            self._shared_tables, shared_bytes = shared_tables(shape)
        kernels = load_kernels(source, *names, macros=macros)
        self._kernels = {
            name: kernel.with_shared(0 if name == "pad" else shared_bytes)
            for name, kernel in zip(names, kernels, strict=True)
        }
        arrays |= {"ids": self.ids, "weights": self.weights, "num_tokens": self._num_tokens}
        self._params = ParamStruct(plan_params_dtype)
        fields = self._params.fields
        for name, array in arrays.items():
            fields[name] = array.data.ptr
        fields["g"], fields["num_words"] = geometry_params(shape), num_words
        first, last = (self._params.index_of(PLAN_OUTPUTS[i][1]) for i in (0, -1))
        self._outputs, self._tables = slice(first, last + 1), self._params.index_of("tables")
        self._output_offsets = self.offsets_of(name for name, _ in PLAN_OUTPUTS)

    def offsets_of(self, tables: Iterable[str]) -> np.ndarray:
        """[tables] uint64: byte offset of each within a plan's memory."""
        return np.array([self.table_offsets[name] for name in tables], np.uint64)

    def prepare(
        self,
        stream: int,
        params: ParamStruct,
        tables: int,
        orders: tuple[ParamStruct, ParamStruct],
        link: ParamStruct,
        *,
        pads: bool,
    ) -> None:
        """Make the plan, and the order of both GEMMs' tiles, from all ranks' routing. A planner of
        one block waits for the ranks, too.

        Args:
            params: ExchangeParams.
            tables: address of the plan's memory, [table_words(shape)] int32.
            orders: TileOrderParams of the up and the down GEMM; where they are null, no order is
                made.
            link: EmulatedLink of what comes.
            pads: whether padding rows are zeroed too.
        """
        self._point_to(tables)
        if not self._small:
            arguments = (params, self._params, *orders, link, FLAGS[pads])
            self._kernels["prepare"](stream, self._grid, *arguments)
            return
        self._kernels["prepare_small"](
            stream, 1, params, self._params, self._shared_tables, *orders, link
        )
        if pads:
            self._kernels["pad"](stream, self._grid, params)

    def plan(self, ids: DeviceArray, weights: DeviceArray, num_tokens: DeviceArray) -> Plan:
        """The plan alone, on CuPy's current stream.

        Args:
            ids: [W, max_tokens, K] int32, weights likewise float32, num_tokens [W] int32.
        """
        import cupy as cp

        tables = cp.ndarray(table_words(self._shape), np.int32)
        self.ids[...], self.weights[...], self._num_tokens[...] = ids, weights, num_tokens
        self._point_to(tables.data.ptr)
        self._counters.fill(0)
        if self._small:
            self._kernels["plan_small"](current_stream(), 1, self._params, self._shared_tables)
        else:
            self._kernels["plan"](current_stream(), self._grid, self._params)
        return self.plan_of(tables)

    def plan_of(self, tables: DeviceArray) -> Plan:
        """A plan's memory as a Plan of CuPy arrays."""
        import cupy as cp

        arrays = {}
        for name, table_shape in self._shapes.items():
            begin = self.table_offsets[name] // 4
            table = tables[begin : begin + math.prod(table_shape)].reshape(table_shape)
            arrays[name] = table.view(cp.float32) if name == "row_weight" else table
        return Plan(**arrays)

    def _point_to(self, tables: int) -> None:
        uint64s, base = self._params.uint64s, np.uint64(tables)
        uint64s[self._outputs] = self._output_offsets + base
        uint64s[self._tables] = base

    def wrong_pair(self) -> int | None:
        """The first wrong pair of the last plan, or None. Synchronises."""
        pair = int(self._read("wrong_pair"))
        return 2**64 - 1 - pair if pair else None

    def largest_need(self) -> tuple[int, int] | None:
        """(rank, rows) of the largest need over capacity in the last plan, or None.
        Synchronises."""
        packed = int(self._read("largest_need"))
        return (0xFFFF - (packed & 0xFFFF), packed >> 16) if packed else None

    def _read(self, name: str) -> np.uint64:
        progress = self.progress.get()[: plan_progress_dtype.itemsize].view(plan_progress_dtype)
        return progress[name][0]
