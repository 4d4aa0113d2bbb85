// Roles that a launch argument limits go to the warps that arrive first. Certain CTAs might arrive
// late, when other kernels hold their SMs, and the others would wait for them.
#pragma once

#include "gemm/roles.cuh"
#include "protocol/exchange_params.cuh"

namespace cometrt {

// By all lanes of a warp, once: whether it is among the first to arrive for the role, as many as
// `num_ctas` CTAs have.
__device__ inline bool takes_part(const ExchangeParams& p, LimitedRole role, int num_ctas) {
  if (num_ctas >= static_cast<int>(gridDim.x)) return true;
  int ticket = 0;
  if (threadIdx.x % 32 == 0) ticket = static_cast<int>(atomicAdd(&p.arrivals[role], 1u));
  return __shfl_sync(~0u, ticket, 0) < num_ctas * kCommWarps;
}

}  // namespace cometrt
