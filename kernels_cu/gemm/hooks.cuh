// Where communication enters the engine: one main loop, with or without it.
#pragma once

#include "gemm/tile.cuh"

namespace cometrt {

struct NoHooks {
  // By the thread that loads, before the first load of a tile.
  __device__ void before_loads(const WorkTile&) const {}
  static constexpr bool kSignals = false;
  // Where it signals: by a warp that has issued its stores of a tile; they may not be complete.
  __device__ void after_stores(const WorkTile&) const {}
};

}  // namespace cometrt
