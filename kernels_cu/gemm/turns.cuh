// Who computes what: one thread of a cluster deals turns, and all warps of both CTAs take them.
#pragma once

#include "gemm/tile.cuh"
#include "hopper/cluster.cuh"

namespace cometrt {

constexpr u32 kReleasesOfSlot = kClusterSize * kWarpgroups * 4;  // each warp of each CTA
constexpr int kOver = -2;  // in place of an M-tile: no turn is left
// Each warp that multiplies and the one that loads, of each CTA.
constexpr u32 kReadersOfTurn = kClusterSize * (4 * kWarpgroups + 1);

// By one thread; then a fence of the barriers, and all of the cluster meet.
__device__ inline void init_barriers(Shared& shared) {
  for (int i = 0; i < kStages; ++i) {
    mbarrier_init(&shared.full[i], 1);
    mbarrier_init(&shared.empty[i], kReleasesOfSlot);
  }
  for (int i = 0; i < kTurnsAhead; ++i) {
    mbarrier_init(&shared.turn_full[i], 1);
    mbarrier_init(&shared.turn_empty[i], kReadersOfTurn);
  }
}

// The first CTA's dealer: whoever is free takes the next turn, so that uneven tiles and late
// arrivals even out. `turn_full` is released here, by the data's own arrival.
__device__ inline void deal_turns(Shared& shared, const GemmParams& p) {
  const u32 listed = *p.num_turns, num_clusters = gridDim.x / kClusterSize;
  const u32 num_turns = p.ok == nullptr || *p.ok ? listed : 0;
  Ring<kTurnsAhead> at;
  for (bool over = false; !over; at.advance()) {
    mbarrier_wait(&shared.turn_empty[at.slot], at.phase ^ 1);
    const u32 turn = atomicAdd(&p.progress[0], 1);
    over = turn >= num_turns;
    for (int cta = 0; cta < kClusterSize; ++cta) {
      const long long index = static_cast<long long>(turn) * kClusterSize + cta;
      const int4 item =
          over ? make_int4(kOver, 0, 0, 0) : reinterpret_cast<const int4*>(p.items)[index];
      mbarrier_arrive_expect_at(&shared.turn_full[at.slot], cta, sizeof(WorkItem));
      store_async(&shared.turns[at.slot], item, &shared.turn_full[at.slot], cta);
    }
  }
  __threadfence();
  if (atomicAdd(&p.progress[1], 1) == num_clusters - 1) p.progress[0] = p.progress[1] = 0;
}

// A warp's view; `kLanes` 1: that of the one thread that loads.
template <int kLanes>
class Turns {
 public:
  __device__ explicit Turns(Shared& shared) : shared_(shared) {}

  // False when none is left.
  __device__ bool take(WorkItem& item) {
    mbarrier_wait(&shared_.turn_full[at_.slot], at_.phase);
    item = shared_.turns[at_.slot];
    if (kLanes > 1) __syncwarp();
    if (threadIdx.x % 32 == 0) mbarrier_arrive_at(&shared_.turn_empty[at_.slot], 0);
    at_.advance();
    return item.tile != kOver;
  }

 private:
  Shared& shared_;
  Ring<kTurnsAhead> at_;
};

}  // namespace cometrt
