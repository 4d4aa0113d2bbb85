"""NumPy mirrors of the kernels' parameter structs; a test compares sizes and offsets.

Pointers are 8-byte integers: an array's ``data.ptr``.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from cometrt.activations import ACTIVATIONS
from cometrt.plan import Plan, PlanShape
from cometrt.world.base import header_dtype
from cometrt.world.failure import FAILURE_NUMBERS

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
            "first_wrong_pair",
            "largest_need",
            *(name for _, name in PLAN_OUTPUTS),
        )
    ]
)

MAX_RANKS = 64  # kMaxRanks of comm/world.cuh
record_dtype = np.dtype([(name, np.int64) for name in FAILURE_NUMBERS])
control_dtype = np.dtype(
    [
        ("source_ready", np.uint64, MAX_RANKS),
        ("header", header_dtype, (2, MAX_RANKS)),
        ("failure", record_dtype, MAX_RANKS),
        ("abort", np.uint64),
        ("reported", np.uint64),
        ("epoch", np.uint64),
    ]
)
world_dtype = np.dtype(
    [
        ("control", np.uint64, MAX_RANKS),
        ("data", np.uint64, MAX_RANKS),
        ("flags", np.uint64, MAX_RANKS),
        ("generation", np.uint64),
        ("timeout_ns", np.uint64),
        ("rank", np.int32),
        ("size", np.int32),
    ]
)

# struct in kernels_cu -> (header, mirror)
MIRRORS = {
    "Geometry": ("common/geometry.cuh", geometry_dtype),
    "PlanParams": ("plan/plan.cuh", plan_params),
    "Header": ("comm/world.cuh", header_dtype),
    "FailureRecord": ("comm/world.cuh", record_dtype),
    "Control": ("comm/world.cuh", control_dtype),
    "World": ("comm/world.cuh", world_dtype),
}


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
