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
            "up_columns gated block_m block_tokens capacity max_tiles blocks_per_home activation "
            "waves unused"
        ).split()
    ]
)

# Scratch and results of the planner, in the order of PlanParams.
PLAN_SCRATCH = (
    "chunk_counts counts token_counts list_start pair_list rank_rows rank_num_tiles rank_order "
    "rank_tile_position segment_counts segment_before column_tokens block_position first_position"
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
            *"progress tables num_words".split(),
            *(name for _, name in PLAN_OUTPUTS),
        )
    ]
)

# Numbers of lists and steps: kNumLists and kNumSteps of plan/plan.cuh.
plan_progress = np.dtype(
    [(name, np.uint64) for name in "wrong_pair largest_need".split()]
    + [("taken", np.uint32, 7), ("done", np.uint32, 5)]
)
call_state_dtype = np.dtype([(name, np.uint32) for name in "ticket status ok told".split()])
traced_call_state_dtype = np.dtype([*call_state_dtype.descr, ("trace", np.uint64)], align=True)
TRACE_LANES, _EVENTS_OF_LANE = 15, 511  # kTraceLanes, kEventsOfLane of common/trace.cuh
trace_event_dtype = np.dtype(
    [(name, np.uint64) for name in "begin_ns end_ns".split()]
    + [(name, np.uint32) for name in "local_bytes link_bytes".split()]
    + [("tile", np.int32), ("column", np.int16), ("kind", np.uint16)]
)
trace_lane_dtype = np.dtype(
    [
        ("num_events", np.uint32),
        ("unused", np.uint32, (3,)),
        ("since_ns", np.uint64),
        ("waits_since_ns", np.uint64),
        ("events", trace_event_dtype, (_EVENTS_OF_LANE,)),
    ]
)
MOST_REPORTED_IDS = 1024  # kMostReportedIds of exchange/call.cuh
call_report_dtype = np.dtype(
    [("kind", np.uint64), ("epoch", np.uint64), ("layer", np.int64), ("operation", np.int64)]
    + [(name, np.uint64) for name in "wrong_pair largest_need".split()]
    + [("wrong_weight", np.float32), ("wrong_ids", np.int32, (MOST_REPORTED_IDS + 1,))]
)
HEAP_OFFSETS = {  # field of Call -> array of the heap
    "x_at": "x",
    "dy_at": "dy",
    "ids_at": "ids0",  # and ids1: in the same place of the other segment
    "weights_at": "weights0",
    "staging_at": "staging",
    "dweight_at": "dweight",
    "partials_at": "partials_ready",
}
CALL_TABLES = (
    "expert_offsets expert_rows row_weight pair_row pull_tokens pull_offsets send_tokens "
    "send_offsets send_base push_blocks num_blocks home_slot home_base"
).split()
call_dtype = np.dtype(
    [("world", world_dtype), ("g", geometry_dtype)]
    + [
        (name, np.int32)
        for name in ("num_chunks num_tokens ids_are_64 weighted chunk_columns num_counters").split()
    ]
    + [(name, np.uint64) for name in HEAP_OFFSETS]
    + [(name, np.int64) for name in "operation layer spec_hash".split()]
    + [
        (name, np.uint64)
        for name in (
            *"forward_epoch state report x dy ids weights kept_epoch kept_x".split(),
            *"all_ids all_weights progress".split(),
            *CALL_TABLES,
            *"pull_at rows partial_rows out dweight_rows out_dweight".split(),
            *"counters tile_filled tile_done taken arrived".split(),
        )
    ]
)
activation_params = np.dtype(
    [("g", geometry_dtype)]
    + [(name, np.uint64) for name in "expert_offsets row_weight z a da dz dweight_rows".split()]
)
gemm_params = np.dtype(
    [(name, np.uint64) for name in "items num_turns progress out z ok".split()]
    + [(name, np.int32) for name in "num_k_blocks num_columns".split()]
)
pace_dtype = np.dtype(
    [(name, np.uint64) for name in "free_at_ns femtoseconds_per_byte latency_ns".split()]
)
planned_tiles_dtype = np.dtype(
    [
        (name, np.uint64)
        for name in "tile_order num_tiles tile_expert expert_offsets expert_rows".split()
    ]
)
turns_params = np.dtype(
    [(name, np.uint64) for name in "items num_turns progress".split()]
    + [
        (name, np.int32)
        for name in "num_columns backwards chunk group num_parts part_turns".split()
    ]
)
part_dtype = np.dtype([("block_position", np.uint64), ("index", np.int32), ("count", np.int32)])

# struct in kernels_cu -> (header, mirror)
MIRRORS = {
    "Geometry": ("common/geometry.cuh", geometry_dtype),
    "PlanParams": ("plan/plan.cuh", plan_params),
    "PlanProgress": ("plan/plan.cuh", plan_progress),
    "Header": ("comm/world.cuh", header_dtype),
    "FailureRecord": ("comm/world.cuh", record_dtype),
    "Control": ("comm/world.cuh", control_dtype),
    "World": ("comm/world.cuh", world_dtype),
    "CallState": ("exchange/call.cuh", call_state_dtype),
    "TracedCallState": ("exchange/call.cuh", traced_call_state_dtype),
    "TraceEvent": ("common/trace.cuh", trace_event_dtype),
    "TraceLane": ("common/trace.cuh", trace_lane_dtype),
    "CallReport": ("exchange/call.cuh", call_report_dtype),
    "Call": ("exchange/call.cuh", call_dtype),
    "WorkItem": ("gemm/tile.cuh", work_item_dtype),
    "GemmParams": ("gemm/tile.cuh", gemm_params),
    "Pace": ("comm/pacing.cuh", pace_dtype),
    "PlannedTiles": ("schedule/turns.cuh", planned_tiles_dtype),
    "TurnsParams": ("schedule/turns.cuh", turns_params),
    "Part": ("schedule/parts.cuh", part_dtype),
    "ActivationParams": ("exchange/activation.cuh", activation_params),
}


class Argument:
    """What kernels take by value. Launches copy it: it may be changed and passed again.

    Args:
        value: an array, or a NumPy scalar, whose bytes they are.

    Attributes:
        address: of those bytes.
    """

    def __init__(self, value: np.ndarray | np.generic) -> None:
        self.value = np.atleast_1d(value)
        self.address = int(self.value.ctypes.data)


class Record(Argument):
    """A struct.

    Attributes:
        fields: size-1 array of its mirror.
        words: the same as 8-byte integers.
    """

    def __init__(self, dtype: np.dtype) -> None:
        assert dtype.itemsize % 8 == 0
        self.fields = np.zeros(1, dtype)
        self.words = self.fields.view(np.uint64)
        super().__init__(self.fields)

    def place(self, name: str) -> int:
        """The word in which an 8-byte field lies."""
        return int(self.fields.dtype.fields[name][1]) // 8


def pace_record(free_at_ns: int, link: Link | None) -> Record:
    """A Pace; free_at_ns: address of the link's clock on the device."""
    record = Record(pace_dtype)
    if link is not None:
        record.fields["free_at_ns"] = free_at_ns
        record.fields["femtoseconds_per_byte"] = link.femtoseconds_per_byte
        record.fields["latency_ns"] = round(link.latency_us * 1000)
    return record


def part_record(block_position: int, index: int, count: int) -> Record:
    """A Part; block_position: address of the planner's table, which only parts of several need."""
    record = Record(part_dtype)
    record.fields["block_position"] = block_position
    record.fields["index"], record.fields["count"] = index, count
    return record


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
        "block_tokens": min(config.block_tokens, spec.max_tokens),  # products of it fit 32 bits
        "capacity": shape.capacity,
        "max_tiles": shape.max_tiles,
        "blocks_per_home": shape.blocks_per_home,
        "activation": list(ACTIVATIONS).index(spec.activation),
        "waves": len(config.last_distances(geometry.size)),
    }
    for name, value in values.items():
        record[name] = value
    return record
