"""The device planner: the plan of `cometrt.plan.reference`, bit for bit, on the GPU.

One launch and no host synchronisation. Wrong routing is found too, and left in `errors`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from cometrt.kernels.launch import load_kernels
from cometrt.kernels.params import (
    EXCHANGE_TABLES,
    PLAN_OUTPUTS,
    ParamStruct,
    geometry_params,
    plan_params_dtype,
    plan_progress_dtype,
)
from cometrt.plan import Plan, PlanShape
from cometrt.plan.tables import plan_table_shapes
from cometrt.world.partitions import num_sms

_CHUNK = 128  # kChunk of plan/items.cuh
_BLOCKS_PER_SM = 6  # kBlocksPerSm of plan/plan.cu
_SM_BYTES, _BLOCK_BYTES = 228 * 1024, 4 * 1024  # shared memory; what a block takes besides its own
_ALIGNMENT = 64  # words of a table: a bulk copy's, and a cache line's


def _layout(shapes: dict[str, tuple[int, ...]]) -> tuple[dict[str, int], int]:
    """First word of each table in one piece of memory, row_weight last; and where that begins."""
    names = [*(name for name in shapes if name != "row_weight"), "row_weight"]
    offsets, end = {}, 0
    for name in names:
        offsets[name] = end
        end += -(-math.prod(shapes[name]) // _ALIGNMENT) * _ALIGNMENT
    return offsets, offsets["row_weight"]


def _blocks_per_sm(shared_bytes: int) -> int:
    """Blocks that an SM holds at once; more would find nothing to do."""
    return max(1, min(_BLOCKS_PER_SM, _SM_BYTES // (shared_bytes + _BLOCK_BYTES)))


def _counter_words(shape: PlanShape) -> dict[str, int]:
    """32-bit words of each array that must be zero when the kernel begins."""
    geometry = shape.geometry
    words = {
        "progress": plan_progress_dtype.itemsize // 4,
        "counts": geometry.size * geometry.spec.num_experts,
        "token_counts": geometry.size * geometry.ep,
    }
    return {name: -(-count // 4) * 4 for name, count in words.items()}


def planner_scratch(shape: PlanShape) -> dict[str, int]:
    """32-bit words of each array that DevicePlanner keeps for itself."""
    geometry, spec = shape.geometry, shape.geometry.spec
    size, experts = geometry.size, geometry.local_experts
    return {
        "token_tile_counts": size * math.ceil(spec.max_tokens / _CHUNK) * spec.num_experts,
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
    """32-bit words of `DevicePlanner.new_tables`."""
    return _layout(plan_table_shapes(shape))[1] + shape.capacity


def planner_counters(shape: PlanShape) -> int:
    """32-bit words of DevicePlanner's `counters`."""
    return sum(_counter_words(shape).values())


def _shared_words(shape: PlanShape) -> int:
    """What the greediest phase takes of shared memory: place_rows, make_tiles or make_bases."""
    geometry, spec = shape.geometry, shape.geometry.spec
    num_phases = len(shape.config.last_distances(geometry.size))
    return max(
        (5 + spec.tp) * spec.num_experts + _CHUNK * geometry.size,
        (geometry.size + num_phases + 2) * geometry.local_experts,
        geometry.size * geometry.ep,
    )


class DevicePlanner:
    """Plans one layer's exchanges on the current device; scratch memory is its own.

    Args:
        counters: [planner_counters(shape)] uint32, which are zero whenever `prepare` begins.

    Attributes:
        ids, weights: all ranks' routing, of the last forward: [W, max_tokens, K].
        progress: PlanProgress of the last plan, as bytes.
    """

    def __init__(self, shape: PlanShape, counters: Any) -> None:
        import cupy as cp

        self._cp, self._shape = cp, shape
        lengths = planner_scratch(shape)
        self._scratch = {name: cp.empty(length, cp.int32) for name, length in lengths.items()}
        self.block_order_idx = int(self._scratch["block_order_idx"].data.ptr)
        self._counters, begin = counters, 0
        for name, words in _counter_words(shape).items():
            self._scratch[name] = counters[begin : begin + words]
            begin += words
        self.progress = self._scratch.pop("progress").view(cp.uint8)
        routing = planner_routing(shape)
        self.ids = cp.empty(routing["ids"], cp.int32)
        self.weights = cp.empty(routing["weights"], cp.float32)
        self._num_tokens = cp.zeros(routing["num_tokens"], cp.int32)
        self._shapes = plan_table_shapes(shape)
        self._offsets, self._num_words = _layout(self._shapes)
        self._all_words = table_words(shape)
        self._plan, self._prepare = load_kernels("plan/plan.cu", "plan", "prepare")
        self._shared_bytes = 4 * _shared_words(shape)
        for kernel in (self._plan, self._prepare):
            kernel.allow_shared(self._shared_bytes)
        self._grid = (_blocks_per_sm(self._shared_bytes) * num_sms(),)
        self._params = self._new_params()
        fields, offsets = self._params, self._offsets
        self._outputs = slice(*(fields.place(PLAN_OUTPUTS[i][1]) + (i != 0) for i in (0, -1)))
        self._output_bytes = np.array([4 * offsets[name] for name, _ in PLAN_OUTPUTS], np.uint64)
        self._table_bytes = np.array([4 * offsets[name] for name in EXCHANGE_TABLES], np.uint64)
        self._tables_at = fields.place("tables")

    def _new_params(self) -> ParamStruct:
        """All but where the plan is written."""
        record = ParamStruct(plan_params_dtype)
        params = record.fields
        params["g"] = geometry_params(self._shape)
        routing = {"ids": self.ids, "weights": self.weights, "num_tokens": self._num_tokens}
        for name, array in (routing | self._scratch).items():
            params[name] = array.data.ptr
        params["progress"] = self.progress.data.ptr
        params["num_words"] = self._num_words
        return record

    def new_tables(self) -> Any:
        """Memory for a plan, not filled: [words] int32."""
        return self._cp.ndarray(self._all_words, np.int32)

    def plan_of(self, tables: Any) -> Plan:
        """That memory as a Plan's CuPy arrays."""
        import cupy as cp

        arrays = {}
        for name, table_shape in self._shapes.items():
            begin = self._offsets[name]
            table = tables[begin : begin + math.prod(table_shape)].reshape(table_shape)
            arrays[name] = table.view(cp.float32) if name == "row_weight" else table
        return Plan(**arrays)

    def exchange_tables(self, tables: Any) -> np.ndarray:
        """Addresses of the tables in EXCHANGE_TABLES."""
        return self._table_bytes + np.uint64(tables.data.ptr)

    def prepare(
        self, call: ParamStruct, tables: Any, up: ParamStruct, down: ParamStruct, pace: ParamStruct
    ) -> None:
        """Wait for all ranks' routing, make the plan in `tables` and the turns of both GEMMs, all
        on the current stream.

        Args:
            up, down: of `tile_order_params`; without memory for items, no turns are made.
        """
        self._point_to(tables)
        arguments = (call, self._params, up, down, pace)
        self._prepare(self._grid, _CHUNK, *arguments, shared_bytes=self._shared_bytes)

    def plan(self, ids: Any, weights: Any, num_tokens: Any) -> Plan:
        """The plan alone, on the current stream.

        Args:
            ids: [W, max_tokens, K] int32, weights likewise float32, num_tokens [W] int32.
        """
        tables = self.new_tables()
        self.ids[...], self.weights[...], self._num_tokens[...] = ids, weights, num_tokens
        self._point_to(tables)
        self._counters.fill(0)
        self._plan(self._grid, _CHUNK, self._params, shared_bytes=self._shared_bytes)
        return self.plan_of(tables)

    def _point_to(self, tables: Any) -> None:
        base = np.uint64(tables.data.ptr)
        self._params.words[self._outputs] = self._output_bytes + base
        self._params.words[self._tables_at] = base

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
        return self.progress.get()[: plan_progress_dtype.itemsize].view(plan_progress_dtype)[name][
            0
        ]
