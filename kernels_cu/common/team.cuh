// Threads that do one work item together: a whole block, or a part of it with a barrier of its own.
// Used by the planner and the tile order.
#pragma once

#include "hopper/memory.cuh"

namespace cometrt {

template <int kThreads>
struct Team {
  int thread;   // of the team
  int* warps;   // [kThreads / 32], in shared memory, for scan()
  int barrier;  // named barrier of the team; 0: the team is the block

  // The block as a team.
  __device__ static Team of_block(int* warps) { return {static_cast<int>(threadIdx.x), warps, 0}; }

  __device__ void sync() const {
    if (barrier == 0) {
      __syncthreads();
    } else {
      named_barrier(barrier, kThreads);
    }
  }

  // By all threads: the exclusive prefix sum; `total` gets the sum. `warps` is free again on
  // return.
  __device__ int scan(int value, int* total) const {
    const int lane = thread % 32, warp = thread / 32;
    int sum = value;
    for (int step = 1; step < 32; step *= 2) {
      const int left = __shfl_up_sync(~0u, sum, step);
      if (lane >= step) sum += left;
    }
    if (lane == 31) warps[warp] = sum;
    sync();
    int before = 0;
    *total = 0;
#pragma unroll 4
    for (int w = 0; w < kThreads / 32; ++w) {
      if (w < warp) before += warps[w];
      *total += warps[w];
    }
    sync();
    return before + sum - value;
  }
};

}  // namespace cometrt
