// The body of every kernel of the engine: sets up barriers and registers, then runs each warp's
// role.
#pragma once

#include "gemm/consumer.cuh"
#include "gemm/epilogue.cuh"
#include "gemm/producer.cuh"
#include "gemm/roles.cuh"

namespace cometrt {

// Runs a CTA. A kernel's Roles has
//   Registers, a RegisterBudget; Operands, an operand policy;
//   init(): by one thread, initialises barriers of its own;
//   load(shared, p, operands): by the load warp's first thread;
//   communicate(warp): by all warps of warpgroup 0, the load and scheduler warps after their loops;
//   multiply(shared, p, warp): by the multiplying warps.
template <typename Roles, typename Params>
__device__ inline void run_cta(Shared& shared, const Params& p,
                               const typename Roles::Operands& operands, Roles& roles) {
  const u32 cta = cluster_cta();
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x / 32), 0);  // warp-uniform
  if (threadIdx.x == 0) {
    init_barriers(shared);
    roles.init();
    mbarrier_init_fence();
  }
  wait_for_previous_kernel();
  cluster_barrier();
  if (warp < kFirstMultiplyWarp) {
    register_dealloc<Roles::Registers::kFirstWarpgroup>();
    if (threadIdx.x == 32 * kLoadWarp) {
      roles.load(shared, p, operands);
    } else if (threadIdx.x == 32 * kSchedulerWarp && cta == 0) {
      schedule_tiles(shared, p);
    }
    __syncwarp();
    roles.communicate(warp);
    __syncwarp();
  } else {
    register_alloc<Roles::Registers::kMultiplyWarpgroups>();
    roles.multiply(shared, p, warp - kFirstMultiplyWarp);
  }
  cluster_barrier();  // the neighbour may write to this CTA's shared memory until it is done
}

}  // namespace cometrt
