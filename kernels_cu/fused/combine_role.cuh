// The combine role of gemm_combine and up_dgrad_combine_wgrad: their shared memory, and what the
// warps that do not multiply do.
#pragma once

#include "fused/arrivals.cuh"
#include "fused/combine_warp.cuh"
#include "fused/tile_done.cuh"

namespace cometrt {

struct CombineMemory {
  Shared gemm;
  CombineStages sums[kCommWarps];
};
static_assert(sizeof(CombineMemory) <= kMaxSharedBytes, "shared memory of a CTA");
static_assert(2 * sizeof(CombineStages) <= sizeof(Shared::stages),
              "helpers reuse the GEMM's stages");

// Named barrier of the CTA: multiplying warps arrive when no tile is left, helper warps wait.
constexpr int kConsumersDoneBarrier = 1, kConsumersDoneThreads = 128 * kWarpgroups + 2 * 32;

// kHasDweight: as for CombineWarp.
template <bool kHasDweight>
struct CombineRole {
  const ExchangeParams& params;
  const EmulatedLink& link;
  CombineMemory& memory;
  int num_comm;

  // By one thread. mbarrier_init_fence must follow.
  __device__ void init() {
    for (CombineStages& sums : memory.sums) sums.init();
  }

  // By all warps of warpgroup 0, the load and scheduler warps after their loops.
  __device__ void communicate(int warp) {
    CombineStages* sums = &memory.sums[warp - kFirstCommWarp];
    if (warp < kFirstCommWarp) {
      // Helpers reuse the memory of the GEMM's stages. At the barrier both warpgroups have read
      // every stage, so no load into them is pending, not even a multicast of the neighbour.
      named_barrier(kConsumersDoneBarrier, kConsumersDoneThreads);
      sums = reinterpret_cast<CombineStages*>(memory.gemm.stages) + warp;
      if (threadIdx.x % 32 == 0) {
        sums->init();
        mbarrier_init_fence();
      }
      __syncwarp();
    }
    if (!params.state->ok) return;
    if (!takes_part(params, warp < kFirstCommWarp ? kHelperRole : kCombineRole, num_comm)) return;
    CombineWarp<kHasDweight> combine(params, link, *sums);
    combine.recorder = Recorder(params.trace(), 1, kReduceAndPush);
    combine.run();
  }

  // By the warps that multiply, when no tile is left.
  __device__ static void end_of_tiles() {
    named_barrier_arrive(kConsumersDoneBarrier, kConsumersDoneThreads);
  }
};

}  // namespace cometrt
