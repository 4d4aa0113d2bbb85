// Prefix sum over the threads of a block. Used by the planner and the tile order.
#pragma once

namespace cometrt {

// By all threads: the exclusive prefix sum; `total` gets the sum. `shared`: blockDim.x / 32 words,
// free again on return.
__device__ inline int block_scan(int value, int* shared, int* total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int sum = value;
  for (int step = 1; step < 32; step *= 2) {
    const int left = __shfl_up_sync(~0u, sum, step);
    if (lane >= step) sum += left;
  }
  if (lane == 31) shared[warp] = sum;
  __syncthreads();
  int before = 0;
  *total = 0;
#pragma unroll 1
  for (int w = 0; w < static_cast<int>(blockDim.x) / 32; ++w) {
    if (w < warp) before += shared[w];
    *total += shared[w];
  }
  __syncthreads();
  return before + sum - value;
}

}  // namespace cometrt
