// The dynamic tile scheduler. One thread of each cluster pops cluster steps from the work list as
// the cluster comes free and sends each CTA its work tile. The load thread and the multiplying
// warps read it. scheduler_full and scheduler_empty of Shared synchronise them.
#pragma once

#include "gemm/tile.cuh"
#include "hopper/cluster.cuh"

namespace cometrt {

constexpr int kEndOfWork = -2;  // WorkTile::m_tile when no step is left
// Arrivals that complete a barrier's phase. empty: the multiplying warps of both CTAs.
// scheduler_empty: these and both load threads.
constexpr u32 kEmptyArrivals = kClusterSize * kWarpgroups * 4;
constexpr u32 kSchedulerEmptyArrivals = kClusterSize * (4 * kWarpgroups + 1);

// By one thread of each CTA. mbarrier_init_fence and a cluster barrier must follow.
__device__ inline void init_barriers(Shared& shared) {
  for (int i = 0; i < kStages; ++i) {
    mbarrier_init(&shared.full[i], 1);
    mbarrier_init(&shared.empty[i], kEmptyArrivals);
  }
  for (int i = 0; i < kSchedulerStages; ++i) {
    mbarrier_init(&shared.scheduler_full[i], 1);
    mbarrier_init(&shared.scheduler_empty[i], kSchedulerEmptyArrivals);
  }
}

// The scheduler warp's first thread, in CTA 0 of each cluster. Clusters pop steps one by one, so
// that late clusters and small tiles balance. The bytes of each store_async complete
// scheduler_full. The last cluster to finish sets `progress` back to 0 for the next launch.
__device__ inline void schedule_tiles(Shared& shared, const TileList& p) {
  const u32 listed_steps = *p.num_steps, num_clusters = gridDim.x / kClusterSize;
  const u32 num_steps = p.ok == nullptr || *p.ok ? listed_steps : 0;
  PipelineState<kSchedulerStages> state;
  for (bool ends = false; !ends; state.advance()) {
    mbarrier_wait(&shared.scheduler_empty[state.stage], state.parity ^ 1);
    const u32 step = atomicAdd(&p.progress[0], 1);
    ends = step >= num_steps;
    for (int cta = 0; cta < kClusterSize; ++cta) {
      const long long index = static_cast<long long>(step) * kClusterSize + cta;
      const int4 tile = ends ? make_int4(kEndOfWork, 0, 0, 0)
                             : reinterpret_cast<const int4*>(p.work_tiles)[index];
      mbarrier_arrive_expect_at(&shared.scheduler_full[state.stage], cta, sizeof(WorkTile));
      store_async(&shared.work_tiles[state.stage], tile, &shared.scheduler_full[state.stage], cta);
    }
  }
  __threadfence();
  if (atomicAdd(&p.progress[1], 1) == num_clusters - 1) p.progress[0] = p.progress[1] = 0;
}

// A reader of the scheduler: the load thread (kLanes 1) or a multiplying warp (kLanes 32).
template <int kLanes>
class TileScheduler {
 public:
  __device__ explicit TileScheduler(Shared& shared) : shared_(shared) {}

  // Waits for this CTA's next work tile. False when no step is left.
  __device__ bool next(WorkTile& tile) {
    const u32 stage = count_ % kSchedulerStages;
    mbarrier_wait(&shared_.scheduler_full[stage], count_ / kSchedulerStages % 2);
    tile = shared_.work_tiles[stage];
    if (kLanes > 1) __syncwarp();
    if (threadIdx.x % 32 == 0) mbarrier_arrive_at(&shared_.scheduler_empty[stage], 0);
    ++count_;
    return tile.m_tile != kEndOfWork;
  }

 private:
  Shared& shared_;
  u32 count_ = 0;  // tiles read so far: one register, where a stage and a parity are two
};

}  // namespace cometrt
