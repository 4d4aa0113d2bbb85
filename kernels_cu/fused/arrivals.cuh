// Roles that a launch argument limits go to the warps that come first, not to certain CTAs: those
// might come late, when other kernels hold their SMs, and would be waited for.
#pragma once

#include "exchange/call.cuh"
#include "gemm/tile.cuh"

namespace cometrt {

// By all lanes of a warp, once: is it among the first to come for the role, as many as `num_ctas`
// CTAs have?
__device__ inline bool takes_part(const Call& c, Arrivals role, int num_ctas) {
  if (num_ctas >= static_cast<int>(gridDim.x)) return true;
  int place = 0;
  if (threadIdx.x % 32 == 0) place = static_cast<int>(atomicAdd(&c.arrived[role], 1u));
  return __shfl_sync(~0u, place, 0) < num_ctas * kMoverWarps;
}

}  // namespace cometrt
