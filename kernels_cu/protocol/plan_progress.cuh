// Progress of the planner within one call: its queue heads and step counters. `publish` zeroes it,
// plan/plan.cu advances it, and `finish` reads its errors for the report. plan/plan_small.cu writes
// these errors alone.
#pragma once

#include "hopper/memory.cuh"

namespace cometrt {

// Queues of work items; blocks pop from each by a queue head.
enum WorkList : int {
  kCountList,
  kClearList,
  kTileList,
  kPlaceList,
  kSumList,
  kOrderList,
  kStagingList,
  kNumLists
};
// Steps of the planner. A step ends when done[step] counts all its items.
enum PlanStep : int { kCounted, kTiled, kPlaced, kSummed, kPlanned, kNumSteps };

// All zero when the planner begins. Mirrored by plan_progress_dtype in cometrt/kernels/params.py.
struct PlanProgress {
  // wrong_pair: ~pair of the first invalid pair. largest_need: rows << 16 | (0xffff - rank) of the
  // rank that exceeds its capacity the most, or ~0 if there is no plan for another reason. 0: none.
  u64 wrong_pair, largest_need;
  u32 queue_heads[kNumLists], done[kNumSteps];
};

}  // namespace cometrt
