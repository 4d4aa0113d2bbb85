// Where communication enters the engine: one main loop, with or without it.
#pragma once

#include "gemm/tile.cuh"

namespace cometrt {

struct NoHooks {
  // The producer's thread, before the first load of a tile.
  __device__ void before_loads(const WorkItem&) const {}
  // A warp, when its stores of a tile are issued (not yet complete).
  __device__ void after_stores(const WorkItem&) const {}
};

}  // namespace cometrt
