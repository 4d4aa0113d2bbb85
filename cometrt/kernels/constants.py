"""Constants that the host and the kernels share, written here alone.

The compiler gets each of MACROS as COMETRT_<name>. What only a kernel knows (its block size, its
shared memory) is read from the compiled kernel instead: see `cometrt.kernels.launch.Kernel`.
"""

from __future__ import annotations

BLOCK_M, BLOCK_N, BLOCK_K = 128, 256, 64  # the engine's tile
SMALL_BLOCK_N = 128  # the same for the fused forward of small batches
CLUSTER_SIZE = 2  # CTAs that share an operand
TOKEN_TILE = 128  # tokens that a team of the planner counts or places, one a thread
PLAN_BLOCKS_PER_SM = 6  # of the planner; as many as get by without spills
PLAN_TEAMS = 8  # teams of TOKEN_TILE threads in the block that plans a small exchange
PLAN_PATIENCE = 2  # a wait within a plan lasts so many times the world's timeout
LATE_PATIENCE = 6  # the same of a wait for late parts; others of such a call last up to 3 more
MAX_RANKS = 64
MAX_TOPK = 1024
MAX_ADDENDS = 128  # rows and partial rows of one token in the fused combine: topk + ranks at most
PULL_WARPS = 4  # of `dispatch`
NUM_REPORTS = 2  # of calls that failed and hold later ones, and of others
NUM_ARRIVALS = 3  # roles in the fused kernels that a launch argument limits
TRACE_LANES, TRACE_EVENTS = 15, 511  # threads of a CTA that record, and events of each

MACROS = {
    name: value for name, value in globals().items() if name.isupper() and isinstance(value, int)
}
