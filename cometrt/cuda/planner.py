"""The device planner: the plan of `cometrt.plan.reference`, bit for bit, on the GPU.

One launch and no host synchronisation. Wrong routing is found too: it is left in `errors`
for whoever looks when the device has come so far.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from cometrt.kernels.launch import load_kernels
from cometrt.kernels.params import (
    PLAN_OUTPUTS,
    PLAN_SCRATCH,
    geometry_record,
    plan_params,
)
from cometrt.plan import Plan, PlanShape
from cometrt.plan.tables import plan_table_shapes
from cometrt.world.partitions import num_sms

_CHUNK = 128  # kChunk of plan.cu
_BLOCKS_PER_SM = 8  # of those that are resident at once
_ALIGNMENT = 64  # words of a table: a bulk copy's, and a cache line's
_NO_WRONG_PAIR = 2**64 - 1


def _layout(shapes: dict[str, tuple[int, ...]]) -> tuple[dict[str, int], int]:
    """First word of each table in one piece of memory, row_weight last; and where that begins."""
    names = [*(name for name in shapes if name != "row_weight"), "row_weight"]
    offsets, end = {}, 0
    for name in names:
        offsets[name] = end
        end += -(-math.prod(shapes[name]) // _ALIGNMENT) * _ALIGNMENT
    return offsets, offsets["row_weight"]


class DevicePlanner:
    """Plans one layer's exchanges on the current device; scratch memory is its own."""

    def __init__(self, shape: PlanShape) -> None:
        import cupy as cp

        self._shape = shape
        geometry = shape.geometry
        size, experts, spec = geometry.size, geometry.local_experts, geometry.spec
        self._chunks = math.ceil(spec.max_tokens / _CHUNK)
        pairs = shape.global_tokens * spec.topk
        lengths = {
            "chunk_counts": size * self._chunks * spec.num_experts,
            "counts": size * spec.num_experts,
            "list_start": size * spec.num_experts,
            "token_counts": size * geometry.ep,
            "pair_index": pairs,
            "pair_list": pairs,
            "rank_upto": size * size * experts,
            "rank_position": size * size * experts,
            "rank_first_tile": size * experts,
            "rank_num_tiles": size,
            "rank_order": size * shape.max_tiles,
            "segment_counts": 2 * size * shape.max_tiles,
            "segment_before": 2 * size * shape.max_tiles,
            "column_tokens": 2 * size,
            "block_position": size * shape.blocks_per_home,
        }
        self._scratch = {name: cp.empty(lengths[name], cp.int32) for name in PLAN_SCRATCH}
        self._arrivals = cp.zeros(1, cp.uint32)
        self.errors = cp.empty(2, cp.uint64)  # first wrong pair, largest need over capacity
        self._shapes = plan_table_shapes(shape)
        self._offsets, self._num_words = _layout(self._shapes)
        (self._kernel,) = load_kernels("plan/plan.cu", "plan")
        self._shared_bytes = 16 * spec.num_experts
        self._kernel.allow_shared(self._shared_bytes)

    def new_plan(self) -> Plan:
        """Memory for one: CuPy arrays, not filled; row_weight lies behind all others."""
        import cupy as cp

        words = cp.empty(self._num_words + self._shape.capacity, cp.int32)
        tables = {}
        for name, table_shape in self._shapes.items():
            begin = self._offsets[name]
            table = words[begin : begin + math.prod(table_shape)].reshape(table_shape)
            tables[name] = table.view(cp.float32) if name == "row_weight" else table
        return Plan(**tables)

    def plan(self, ids: Any, weights: Any, num_tokens: Any, out: Plan) -> Plan:
        """Fill `out`, from `new_plan`, on the current stream.

        Args:
            ids: [W, max_tokens, K] int32, weights likewise float32, num_tokens [W] int32.
        """
        tables: dict[str, Any] = {name: getattr(out, name) for name, _ in PLAN_OUTPUTS}
        params = np.zeros(1, plan_params)
        params["g"] = geometry_record(self._shape)
        pointers = {"ids": ids, "weights": weights, "num_tokens": num_tokens, **self._scratch}
        pointers |= {mirror: tables[name] for name, mirror in PLAN_OUTPUTS}
        for name, array in pointers.items():
            params[name] = array.data.ptr
        params["arrivals"] = self._arrivals.data.ptr
        params["first_wrong_pair"] = self.errors.data.ptr
        params["largest_need"] = self.errors.data.ptr + 8
        first = next(iter(self._offsets))
        params["tables"], params["num_words"] = tables[first].data.ptr, self._num_words
        grid = (_BLOCKS_PER_SM * num_sms(),)
        self._kernel(grid, _CHUNK, params, shared_bytes=self._shared_bytes)
        return out

    def wrong_pair(self) -> int | None:
        """The first wrong pair of the last plan, or None. Synchronises."""
        pair = int(self.errors[0])
        return None if pair == _NO_WRONG_PAIR else pair

    def largest_need(self) -> tuple[int, int] | None:
        """(rank, rows) of the largest need over capacity in the last plan, or None.
        Synchronises."""
        packed = int(self.errors[1])
        return (0xFFFF - (packed & 0xFFFF), packed >> 16) if packed else None
