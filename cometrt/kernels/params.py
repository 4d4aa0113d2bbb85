"""NumPy mirrors of the kernels' parameter structs; a test compares sizes and offsets.

Pointers are 8-byte integers: an array's ``data.ptr``.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from cometrt.activations import ACTIVATIONS
from cometrt.plan import Plan, PlanShape
from cometrt.plan.turns import work_item_dtype
from cometrt.world.layout import control_dtype, header_dtype, record_dtype, world_dtype
from cometrt.world.link import Link

geometry_dtype = np.dtype(
    [
        (name, np.int32)
        for name in (
            "rank size tp ep num_experts local_experts topk max_tokens hidden local_intermediate "
            "up_columns gated block_m block_tokens capacity max_tiles blocks_per_home activation"
        ).split()
    ]
)

# Scratch and results of the planner, in the order of PlanParams.
PLAN_SCRATCH = (
    "chunk_counts counts list_start token_counts pair_index pair_list rank_upto rank_position "
    "rank_first_tile rank_num_tiles rank_order segment_counts segment_before column_tokens "
    "block_position"
).split()
_PLAN_OUTPUTS = {"num_tiles": "out_num_tiles", "num_tokens": "out_num_tokens"}
PLAN_OUTPUTS = [
    (field.name, _PLAN_OUTPUTS.get(field.name, field.name)) for field in dataclasses.fields(Plan)
]

plan_params = np.dtype(
    [("g", geometry_dtype)]
    + [
        (name, np.uint64)
        for name in (
            "ids",
            "weights",
            "num_tokens",
            *PLAN_SCRATCH,
            *"arrivals first_wrong_pair largest_need tables num_words".split(),
            *(name for _, name in PLAN_OUTPUTS),
        )
    ]
)

call_state_dtype = np.dtype([("ticket", np.uint32), ("ok", np.uint32), ("epoch", np.int64)])
HEAP_OFFSETS = {  # field of Call -> array of the heap
    "x_at": "x",
    "dy_at": "dy",
    "ids_at": "ids",
    "weights_at": "weights",
    "staging_at": "staging",
    "dweight_at": "dweight",
    "partials_at": "partials_ready",
}
CALL_TABLES = (
    "expert_offsets row_pair row_weight pair_row pull_tokens pull_offsets send_tokens "
    "send_offsets send_base push_blocks num_blocks home_slot home_base"
).split()
call_dtype = np.dtype(
    [("world", world_dtype), ("g", geometry_dtype)]
    + [
        (name, np.int32)
        for name in "num_chunks num_tokens ids_are_64 weighted chunk_columns unused".split()
    ]
    + [(name, np.uint64) for name in HEAP_OFFSETS]
    + [(name, np.int64) for name in "operation layer spec_hash".split()]
    + [
        (name, np.uint64)
        for name in (
            *"forward_epoch state x dy ids weights all_ids all_weights all_num_tokens".split(),
            "errors",
            *CALL_TABLES,
            *"pull_at rows partial_rows out dweight_rows out_dweight".split(),
            *"tile_filled tile_done block_pushed".split(),
        )
    ]
)
activation_params = np.dtype(
    [("g", geometry_dtype)]
    + [(name, np.uint64) for name in "expert_offsets row_weight z a da dz dweight_rows".split()]
)
gemm_params = np.dtype(
    [(name, np.uint64) for name in "items num_turns progress out z".split()]
    + [(name, np.int32) for name in "num_k_blocks num_columns".split()]
)
pace_dtype = np.dtype(
    [(name, np.uint64) for name in "free_at_ns femtoseconds_per_byte latency_ns".split()]
)
turns_params = np.dtype(
    [
        (name, np.uint64)
        for name in (
            *"tile_order num_tiles tile_expert expert_offsets expert_rows".split(),
            *"ok items num_turns progress".split(),
        )
    ]
    + [(name, np.int32) for name in "num_columns max_run backwards chunk".split()]
)

# struct in kernels_cu -> (header, mirror)
MIRRORS = {
    "Geometry": ("common/geometry.cuh", geometry_dtype),
    "PlanParams": ("plan/plan.cuh", plan_params),
    "Header": ("comm/world.cuh", header_dtype),
    "FailureRecord": ("comm/world.cuh", record_dtype),
    "Control": ("comm/world.cuh", control_dtype),
    "World": ("comm/world.cuh", world_dtype),
    "CallState": ("exchange/call.cuh", call_state_dtype),
    "Call": ("exchange/call.cuh", call_dtype),
    "WorkItem": ("gemm/tile.cuh", work_item_dtype),
    "GemmParams": ("gemm/tile.cuh", gemm_params),
    "Pace": ("comm/pacing.cuh", pace_dtype),
    "TurnsParams": ("schedule/turns.cuh", turns_params),
    "ActivationParams": ("exchange/activation.cuh", activation_params),
}


def pace_record(free_at_ns: int, link: Link | None) -> np.ndarray:
    """A Pace, to be passed by value; free_at_ns: address of the link's clock on the device."""
    record = np.zeros(1, pace_dtype)
    if link is not None:
        record["free_at_ns"] = free_at_ns
        record["femtoseconds_per_byte"] = link.femtoseconds_per_byte
        record["latency_ns"] = round(link.latency_us * 1000)
    return record.view(f"V{pace_dtype.itemsize}")


def geometry_record(shape: PlanShape) -> np.ndarray:
    """The Geometry of one rank's layer."""
    geometry, config, spec = shape.geometry, shape.config, shape.geometry.spec
    record = np.zeros(1, geometry_dtype)
    values = {
        "rank": geometry.rank,
        "size": geometry.size,
        "tp": spec.tp,
        "ep": geometry.ep,
        "num_experts": spec.num_experts,
        "local_experts": geometry.local_experts,
        "topk": spec.topk,
        "max_tokens": spec.max_tokens,
        "hidden": spec.hidden,
        "local_intermediate": geometry.local_intermediate,
        "up_columns": geometry.up_columns,
        "gated": spec.gated,
        "block_m": config.block_m,
        "block_tokens": config.block_tokens,
        "capacity": shape.capacity,
        "max_tiles": shape.max_tiles,
        "blocks_per_home": shape.blocks_per_home,
        "activation": list(ACTIVATIONS).index(spec.activation),
    }
    for name, value in values.items():
        record[name] = value
    return record
