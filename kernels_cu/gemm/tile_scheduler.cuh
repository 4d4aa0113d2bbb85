// Who computes what: one thread of a cluster takes work tiles from the list as the cluster comes
// free, and hands them to all warps of both CTAs.
#pragma once

#include "gemm/tile.cuh"
#include "hopper/cluster.cuh"

namespace cometrt {

constexpr u32 kArrivalsOfStage = kClusterSize * kWarpgroups * 4;  // each warp of each CTA
constexpr int kEndOfWork = -2;  // in place of an M-tile: no work tile is left
// Each warp that multiplies and the one that loads, of each CTA.
constexpr u32 kArrivalsOfScheduler = kClusterSize * (4 * kWarpgroups + 1);

// By one thread. A fence of the barriers and a barrier of the cluster follow.
__device__ inline void init_barriers(Shared& shared) {
  for (int i = 0; i < kStages; ++i) {
    mbarrier_init(&shared.full[i], 1);
    mbarrier_init(&shared.empty[i], kArrivalsOfStage);
  }
  for (int i = 0; i < kSchedulerStages; ++i) {
    mbarrier_init(&shared.scheduler_full[i], 1);
    mbarrier_init(&shared.scheduler_empty[i], kArrivalsOfScheduler);
  }
}

// The scheduler thread, in the cluster's first CTA. A cluster takes its next tiles when it comes
// free, so that clusters that start late or meet small tiles even out. The data's own arrival
// signals `scheduler_full`.
__device__ inline void schedule_tiles(Shared& shared, const TileList& p) {
  const u32 listed = *p.num_steps, num_clusters = gridDim.x / kClusterSize;
  const u32 num_steps = p.ok == nullptr || *p.ok ? listed : 0;
  PipelineState<kSchedulerStages> at;
  for (bool ends = false; !ends; at.advance()) {
    mbarrier_wait(&shared.scheduler_empty[at.stage], at.parity ^ 1);
    const u32 step = atomicAdd(&p.progress[0], 1);
    ends = step >= num_steps;
    for (int cta = 0; cta < kClusterSize; ++cta) {
      const long long index = static_cast<long long>(step) * kClusterSize + cta;
      const int4 tile = ends ? make_int4(kEndOfWork, 0, 0, 0)
                             : reinterpret_cast<const int4*>(p.work_tiles)[index];
      mbarrier_arrive_expect_at(&shared.scheduler_full[at.stage], cta, sizeof(WorkTile));
      store_async(&shared.work_tiles[at.stage], tile, &shared.scheduler_full[at.stage], cta);
    }
  }
  __threadfence();
  if (atomicAdd(&p.progress[1], 1) == num_clusters - 1) p.progress[0] = p.progress[1] = 0;
}

// A warp's view of the work tiles. `kLanes` 1: that of the one thread that loads.
template <int kLanes>
class TileScheduler {
 public:
  __device__ explicit TileScheduler(Shared& shared) : shared_(shared) {}

  // False when none is left.
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
  u32 count_ = 0;  // tiles taken: one register, where stage and parity are two
};

}  // namespace cometrt
