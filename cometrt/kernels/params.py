"""NumPy mirrors of the kernels' parameter structs; a test compares sizes and offsets.

Pointers are 8-byte integers: an array's ``data.ptr``.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from cometrt.activations import ACTIVATIONS
from cometrt.kernels import rail_params
from cometrt.kernels.constants import MAX_TOPK, TRACE_EVENTS
from cometrt.plan import Plan, PlanShape
from cometrt.plan.tile_order import work_tile_dtype
from cometrt.world.layout import device_control_block_dtype, header_dtype, record_dtype, world_dtype

geometry_dtype = np.dtype(
    [
        (name, np.int32)
        for name in (
            "rank size tp ep num_experts local_experts topk max_tokens hidden local_intermediate "
            "up_columns gated block_m block_tokens capacity max_tiles blocks_per_home activation "
            "num_phases min_token_blocks"
        ).split()
    ]
)

# Scratch and results of the planner, in the order of PlanParams.
PLAN_SCRATCH = (
    "token_tile_counts counts token_counts list_start pair_list rank_rows rank_num_tiles "
    "rank_order rank_tile_order_idx run_counts run_starts column_tokens block_order_idx "
    "first_order_idx"
).split()
_PLAN_OUTPUTS = {"num_tiles": "out_num_tiles", "num_tokens": "out_num_tokens"}
PLAN_OUTPUTS = [
    (field.name, _PLAN_OUTPUTS.get(field.name, field.name)) for field in dataclasses.fields(Plan)
]

plan_params_dtype = np.dtype(
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

# Tables of a plan that the planner's steps read again: a plan's memory begins with them.
PLAN_KEPT = (
    "expert_offsets expert_rows row_pair num_tiles tile_expert tile_order pull_offsets "
    "send_offsets block_tokens staging_base"
).split()
# Arrays that a small plan has in shared memory besides those, in the order of SharedTables.
PLAN_SHARED = "ids weights num_tokens".split()
PLAN_SHARED += [name for name in PLAN_SCRATCH if name != "block_order_idx"]
shared_tables_dtype = np.dtype(
    [
        (name, np.int32)
        for name in (
            *PLAN_SHARED,
            *(_PLAN_OUTPUTS.get(name, name) for name in PLAN_KEPT),
            *"zero_bytes kept_bytes team team_bytes".split(),
        )
    ]
)

# Numbers of lists and steps: kNumLists and kNumSteps of plan/plan.cuh.
plan_progress_dtype = np.dtype(
    [(name, np.uint64) for name in "wrong_pair largest_need".split()]
    + [("queue_heads", np.uint32, 7), ("done", np.uint32, 5)]
)
exchange_state_dtype = np.dtype(
    [(name, np.uint32) for name in "ticket status ok reported".split()]
    + [(name, np.uint64) for name in "waited_ns rows_waited_ns".split()]
)
traced_exchange_state_dtype = np.dtype(
    [*exchange_state_dtype.descr, ("trace", np.uint64)], align=True
)
trace_event_dtype = np.dtype(
    [(name, np.uint64) for name in "begin_ns end_ns".split()]
    + [(name, np.uint32) for name in "local_bytes link_bytes".split()]
    + [("tile", np.int32), ("column", np.int16), ("kind", np.uint16)]
)
trace_lane_dtype = np.dtype(
    [
        ("num_events", np.uint32),
        ("tile", np.int32),
        ("column", np.int32),
        ("unused", np.uint32),
        ("since_ns", np.uint64),
        ("waits_since_ns", np.uint64),
        ("events", trace_event_dtype, (TRACE_EVENTS,)),
    ]
)
call_stats_dtype = np.dtype([("value", np.uint32), ("epoch", np.uint32)])
exchange_report_dtype = np.dtype(
    [("kind", np.uint64), ("epoch", np.uint64), ("layer", np.int64), ("operation", np.int64)]
    + [(name, np.uint64) for name in "wrong_pair largest_need".split()]
    + [("wrong_weight", np.float32), ("wrong_ids", np.int32, (MAX_TOPK + 1,))]
)
HEAP_OFFSETS = {  # field of ExchangeParams -> array of the heap
    "x_offset": "x",
    "dy_offset": "dy",
    "ids_offset": "ids0",  # and ids1: in the same place of the other region
    "weights_offset": "weights0",
    "staging_offset": "staging",
    "dweight_offset": "dweight",
    "partials_offset": "partials_ready",
}
EXCHANGE_TABLES = (
    "expert_offsets expert_rows row_weight pair_row pull_tokens pull_offsets send_tokens "
    "send_offsets send_base push_blocks num_blocks block_tokens staging_row staging_base"
).split()
exchange_params_dtype = np.dtype(
    [("world", world_dtype), ("g", geometry_dtype)]
    + [
        (name, np.int32)
        for name in (
            "num_n_chunks num_tokens ids_are_64 weighted n_chunk_columns num_counters"
        ).split()
    ]
    + [(name, np.uint64) for name in HEAP_OFFSETS]
    + [(name, np.int64) for name in "operation layer spec_hash".split()]
    + [
        (name, np.uint64)
        for name in (
            *"forward_epoch state report stats x dy ids weights saved_epoch saved_x".split(),
            *"all_ids all_weights progress".split(),
            *EXCHANGE_TABLES,
            *"pull_offset rows x_rows partial_rows out dweight_rows out_dweight".split(),
            *"num_dweight_partials dw_up dw_down dw_up_bytes dw_down_bytes".split(),
            *"counters tile_filled tile_done queue_heads arrivals".split(),
            *"num_parts part_rows late_rows part_sums turn_ends".split(),
        )
    ]
)
activation_params_dtype = np.dtype(
    [("g", geometry_dtype)]
    + [(name, np.uint64) for name in "expert_offsets row_weight z a da dz dweight_rows".split()]
)
problem_dtype = np.dtype(
    [(name, np.uint64) for name in "out z".split()]
    + [(name, np.int32) for name in "num_k_blocks num_columns".split()]
)
_TILE_LIST = [(name, np.uint64) for name in "work_tiles num_steps progress ok".split()]
gemm_params_dtype = np.dtype(
    [*_TILE_LIST, ("problems", problem_dtype, (1,))]
    + [(name, np.int32) for name in "reads_weights_once unused".split()]
)
down_dgrad_params_dtype = np.dtype(
    _TILE_LIST
    + [(name, np.uint64) for name in "z row_weight dz weighted_a dweight".split()]
    + [(name, np.int32) for name in "num_columns num_inner_blocks".split()]
)
MAX_WGRADS = 2  # kMaxWgrads of gemm/wgrad_problem.cuh
wgrad_problem_dtype = np.dtype(
    [("out", np.uint64)]
    + [(name, np.int32) for name in "num_rows num_columns is_float32 expert_stride".split()]
)
wgrad_params_dtype = np.dtype(
    _TILE_LIST
    + [(name, np.uint64) for name in "expert_offsets expert_rows".split()]
    + [("problems", wgrad_problem_dtype, (MAX_WGRADS,))]
    + [(name, np.int32) for name in "num_problems num_experts row_sets".split()]
    + [(name, np.int32) for name in "raster_group accumulate unused".split()]
)
up_dgrad_wgrad_params_dtype = np.dtype(
    [
        *((name, wgrad_params_dtype[name]) for name in wgrad_params_dtype.names or ()),
        ("dx", wgrad_problem_dtype),
        *((name, np.int32) for name in "num_dx_k_blocks padding".split()),
    ]
)
emulated_link_dtype = np.dtype(
    [(name, np.uint64) for name in "free_at_ns femtoseconds_per_byte latency_ns".split()]
)
planned_tiles_dtype = np.dtype(
    [
        (name, np.uint64)
        for name in "tile_order num_tiles tile_expert expert_offsets expert_rows".split()
    ]
)
tile_order_params_dtype = np.dtype(
    [(name, np.uint64) for name in "work_tiles num_steps progress".split()]
    + [(name, np.int32) for name in "num_n_tiles backwards n_chunk raster_group".split()]
    + [(name, np.int32) for name in "num_pipeline_chunks max_steps num_weights unused".split()]
)
pipeline_chunk_dtype = np.dtype(
    [("block_order_idx", np.uint64), ("index", np.int32), ("count", np.int32)]
)
router_params_dtype = np.dtype(
    [
        (name, np.uint64)
        for name in "logits bias mask ids dweights out_ids out_weights dlogits".split()
    ]
    + [("scale", np.float64)]
    + [
        (name, np.int32)
        for name in (
            "num_tokens num_experts topk kind num_groups topk_groups sum_of_two renormalize "
            "mask_stride logits_type bias_type dweights_type ids_are_64 padding"
        ).split()
    ]
)
router_loss_params_dtype = np.dtype(
    [(name, np.uint64) for name in "counts dloss".split()]
    + [("dloss_value", np.float64)]
    + [
        (name, np.uint64)
        for name in "loss chunk_sums pairs factors terms denominator num_done".split()
    ]
    + [
        (name, np.int32)
        for name in (
            "sequence_tokens chunks_per_sequence chunk_tokens balance counts_type dloss_type"
        ).split()
    ]
)
router_load_params_dtype = np.dtype(
    [(name, np.uint64) for name in "ids counts statistics".split()]
    + [("num_ids", np.int64)]
    + [(name, np.int32) for name in "num_experts ids_are_64".split()]
)
router_bias_params_dtype = np.dtype(
    [(name, np.uint64) for name in "bias counts".split()]
    + [("rate", np.float64)]
    + [(name, np.int32) for name in "num_experts bias_stride bias_type counts_type".split()]
)

# struct in kernels_cu -> (header, mirror)
MIRRORS = {
    "Geometry": ("common/geometry.cuh", geometry_dtype),
    "PlanParams": ("plan/plan.cuh", plan_params_dtype),
    "SharedTables": ("plan/plan.cuh", shared_tables_dtype),
    "PlanProgress": ("protocol/plan_progress.cuh", plan_progress_dtype),
    "Header": ("protocol/control_block.cuh", header_dtype),
    "FailureRecord": ("protocol/control_block.cuh", record_dtype),
    "ControlBlock": ("protocol/control_block.cuh", device_control_block_dtype),
    "World": ("protocol/control_block.cuh", world_dtype),
    "ExchangeState": ("protocol/exchange_params.cuh", exchange_state_dtype),
    "TracedExchangeState": ("protocol/exchange_params.cuh", traced_exchange_state_dtype),
    "TraceEvent": ("common/trace.cuh", trace_event_dtype),
    "TraceLane": ("common/trace.cuh", trace_lane_dtype),
    "CallStats": ("protocol/exchange_params.cuh", call_stats_dtype),
    "ExchangeReport": ("protocol/exchange_params.cuh", exchange_report_dtype),
    "ExchangeParams": ("protocol/exchange_params.cuh", exchange_params_dtype),
    "WorkTile": ("scheduler/work_tile.cuh", work_tile_dtype),
    "Problem": ("gemm/tile.cuh", problem_dtype),
    "GemmParams": ("gemm/tile.cuh", gemm_params_dtype),
    "DownDgradParams": ("gemm/down_dgrad_epilogue.cuh", down_dgrad_params_dtype),
    "WgradProblem": ("gemm/wgrad_problem.cuh", wgrad_problem_dtype),
    "WgradParams": ("gemm/wgrad_problem.cuh", wgrad_params_dtype),
    "UpDgradWgradParams": ("gemm/up_dgrad_wgrad.cuh", up_dgrad_wgrad_params_dtype),
    "EmulatedLink": ("protocol/emulated_link.cuh", emulated_link_dtype),
    "PlannedTiles": ("scheduler/tile_order.cuh", planned_tiles_dtype),
    "TileOrderParams": ("scheduler/tile_order.cuh", tile_order_params_dtype),
    "PipelineChunk": ("scheduler/pipeline_chunk.cuh", pipeline_chunk_dtype),
    "ActivationParams": ("sequential/activation.cuh", activation_params_dtype),
    "RailHeader": ("nodes/rail_params.cuh", rail_params.header_dtype),
    "RailOutcome": ("nodes/rail_params.cuh", rail_params.outcome_dtype),
    "RailReport": ("nodes/rail_params.cuh", rail_params.report_dtype),
    "RailParams": ("nodes/rail_params.cuh", rail_params.params_dtype),
    "RouterParams": ("router/params.cuh", router_params_dtype),
    "RouterLossParams": ("router/params.cuh", router_loss_params_dtype),
    "RouterLoadParams": ("router/params.cuh", router_load_params_dtype),
    "RouterBiasParams": ("router/params.cuh", router_bias_params_dtype),
}


class KernelArgument:
    """What kernels take by value. Launches copy it: it may be changed and passed again.

    Args:
        value: an array, or a NumPy scalar, whose bytes they are.

    Attributes:
        address: of those bytes.
    """

    def __init__(self, value: np.ndarray | np.generic) -> None:
        self.value = np.atleast_1d(value)
        self.address = int(self.value.ctypes.data)


class ParamStruct(KernelArgument):
    """A struct.

    Attributes:
        fields: size-1 array of its mirror.
        uint64s: the same as 8-byte integers.
    """

    def __init__(self, dtype: np.dtype) -> None:
        assert dtype.itemsize % 8 == 0
        self.fields = np.zeros(1, dtype)
        self.uint64s = self.fields.view(np.uint64)
        super().__init__(self.fields)

    def index_of(self, name: str) -> int:
        """Where an 8-byte field lies in `uint64s`."""
        return int(self.fields.dtype.fields[name][1]) // 8


def pipeline_chunk_params(block_order_idx: int, index: int, count: int) -> ParamStruct:
    """A PipelineChunk; block_order_idx: address of the planner's table, unless count is 1."""
    record = ParamStruct(pipeline_chunk_dtype)
    record.fields["block_order_idx"] = block_order_idx
    record.fields["index"], record.fields["count"] = index, count
    return record


def geometry_params(shape: PlanShape) -> np.ndarray:
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
        "num_phases": len(config.last_distances(geometry.size)),
        "min_token_blocks": min(config.min_token_blocks, spec.max_tokens),
    }
    for name, value in values.items():
        record[name] = value
    return record
