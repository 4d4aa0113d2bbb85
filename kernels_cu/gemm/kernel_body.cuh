// What every kernel of the engine does: the roles of a CTA's warps.
#pragma once

#include "gemm/consumer.cuh"
#include "gemm/epilogue.cuh"
#include "gemm/producer.cuh"
#include "gemm/roles.cuh"

namespace cometrt {

// Runs a CTA. Roles has: Registers, a RegisterBudget; Operands, an operand policy; init(), by one
// thread, for barriers of its own; load(shared, p, operands) by the load warp's first thread;
// communicate(warp) by the warps of the first warpgroup, of which the first two come when they are
// out of work; multiply(shared, p, warp) by the others.
template <typename Roles, typename Params>
__device__ inline void run_cta(Shared& shared, const Params& p,
                               const typename Roles::Operands& operands, Roles& roles) {
  const u32 cta = cluster_cta();
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x / 32), 0);  // known to be uniform
  if (threadIdx.x == 0) {
    init_barriers(shared);
    roles.init();
    mbarrier_init_fence();
  }
  cluster_barrier();
  if (warp < kFirstMultiplyWarp) {
    register_dealloc<Roles::Registers::kOfFirst>();
    if (threadIdx.x == 32 * kLoadWarp) {
      roles.load(shared, p, operands);
    } else if (threadIdx.x == 32 * kSchedulerWarp && cta == 0) {
      schedule_tiles(shared, p);
    }
    __syncwarp();
    roles.communicate(warp);
    __syncwarp();
  } else {
    register_alloc<Roles::Registers::kOfMultiply>();
    roles.multiply(shared, p, warp - kFirstMultiplyWarp);
  }
  cluster_barrier();  // nobody leaves while the neighbour may still write here
}

}  // namespace cometrt
