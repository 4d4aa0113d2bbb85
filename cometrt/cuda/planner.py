"""The device planner: the plan of `cometrt.plan.reference`, bit for bit, on the GPU.

Eight launches and no host synchronisation. Wrong routing is found too: it is left in `errors`
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

_CHUNK = 128  # kChunk of plan.cu
_NO_WRONG_PAIR = 2**64 - 1


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
        self.errors = cp.empty(2, cp.uint64)  # first wrong pair, largest need over capacity
        (
            self._count,
            self._sum_chunks,
            self._tiles,
            self._rows,
            self._segments,
            self._sum_segments,
            self._place,
            self._push_order,
        ) = load_kernels(
            "plan/plan.cu",
            "plan_count",
            "plan_sum_chunks",
            "plan_tiles",
            "plan_rows",
            "plan_segments",
            "plan_sum_segments",
            "plan_place",
            "plan_push_order",
        )

    def new_plan(self) -> Plan:
        """Memory for one: CuPy arrays, not filled."""
        import cupy as cp

        return Plan(
            **{
                name: cp.empty(shape, cp.float32 if name == "row_weight" else cp.int32)
                for name, shape in plan_table_shapes(self._shape).items()
            }
        )

    def plan(self, ids: Any, weights: Any, num_tokens: Any, out: Plan) -> Plan:
        """Fill `out`, from `new_plan`, on the current stream.

        Args:
            ids: [W, max_tokens, K] int32, weights likewise float32, num_tokens [W] int32.
        """
        shape, size = self._shape, self._shape.geometry.size
        tables: dict[str, Any] = {name: getattr(out, name) for name, _ in PLAN_OUTPUTS}
        for name in tables:
            tables[name].data.memset_async(0 if name == "row_weight" else 0xFF, tables[name].nbytes)
        for name, byte in (("token_counts", 0), ("block_position", 0xFF)):
            self._scratch[name].data.memset_async(byte, self._scratch[name].nbytes)
        self.errors[:1].data.memset_async(0xFF, 8)
        self.errors[1:].data.memset_async(0, 8)

        params = np.zeros(1, plan_params)
        params["g"] = geometry_record(shape)
        pointers = {"ids": ids, "weights": weights, "num_tokens": num_tokens, **self._scratch}
        pointers |= {mirror: tables[name] for name, mirror in PLAN_OUTPUTS}
        for name, array in pointers.items():
            params[name] = array.data.ptr
        params["first_wrong_pair"] = self.errors.data.ptr
        params["largest_need"] = self.errors.data.ptr + 8

        by_token, by_segment = (self._chunks, size), (shape.max_tiles, 2 * size)
        members_bytes = 16 * shape.geometry.spec.num_experts
        self._count(by_token, _CHUNK, params, shared_bytes=members_bytes)
        self._sum_chunks((size,), _CHUNK, params)
        self._tiles((size,), _CHUNK, params)
        self._rows(by_token, _CHUNK, params)
        self._segments(by_segment, _CHUNK, params)
        self._sum_segments((1 + 2 * size,), _CHUNK, params)
        self._place(by_segment, _CHUNK, params)
        blocks = math.ceil(size * shape.blocks_per_home / _CHUNK)
        self._push_order((blocks,), _CHUNK, params)
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
