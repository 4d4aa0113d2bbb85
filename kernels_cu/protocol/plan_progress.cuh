// How far `prepare` has come in a call.
#pragma once

#include "hopper/memory.cuh"

namespace cometrt {

// Queues of work items; blocks pop from each by its queue head.
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
// A step ends when its items are done, whichever blocks did them.
enum PlanStep : int { kCounted, kTiled, kPlaced, kSummed, kPlanned, kNumSteps };

// All zero when the kernel begins. Mirrored by plan_progress in cometrt/kernels/params.py.
struct PlanProgress {
  // 0: none. ~pair of the first wrong pair; (rows << 16 | 0xffff - rank) of the largest need over
  // capacity.
  u64 wrong_pair, largest_need;
  u32 queue_heads[kNumLists], done[kNumSteps];
};

}  // namespace cometrt
