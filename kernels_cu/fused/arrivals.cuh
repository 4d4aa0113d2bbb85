// Limits how many warps of a fused kernel communicate. The warps that arrive first get the role.
// Fixed CTAs could start late, while other kernels hold their SMs, and everyone would wait for
// them.
#pragma once

#include "gemm/roles.cuh"
#include "protocol/exchange_params.cuh"

namespace cometrt {

// By all lanes of a warp, once a role: whether the warp gets it. num_ctas * kCommWarps warps do.
// The relaxed counter p.arrivals[role] protects no data.
__device__ inline bool takes_part(const ExchangeParams& p, LimitedRole role, int num_ctas) {
  if (num_ctas >= static_cast<int>(gridDim.x)) return true;
  int ticket = 0;
  if (threadIdx.x % 32 == 0) ticket = static_cast<int>(atomicAdd(&p.arrivals[role], 1u));
  return __shfl_sync(~0u, ticket, 0) < num_ctas * kCommWarps;
}

}  // namespace cometrt
