// The producer: the load warp's first thread loads the operands of each work tile, a stage of
// BLOCK_K columns at a time. It waits for Shared::empty (all multiplying warps of the cluster) and
// arrives on Shared::full (the multiplying warps of this CTA).
#pragma once

#include "gemm/operands.cuh"
#include "gemm/tile_scheduler.cuh"

namespace cometrt {

// For GEMMs whose operands are complete before the launch.
struct AlwaysReady {
  __device__ void wait(const WorkTile&) {}
};

// `ready.wait(tile)` returns when the tile's operands are in global memory. An idle CTA (m_tile -1)
// still completes its stages, since its neighbour's multicasts and arrivals count on them.
template <typename Params, typename Operands, typename TileReady>
__device__ inline void produce(Shared& shared, const Params& p, const Operands& operands,
                               TileReady& ready) {
  TileScheduler<1> scheduler(shared);
  StageState state;
  WorkTile tile;
  while (scheduler.next(tile)) {
    const bool idle = tile.m_tile < 0;
    const u32 bytes = operands.a_bytes(tile) + sizeof(Stage::b);
    if (!idle) ready.wait(tile);
    const int num_k_blocks = p.num_k_blocks(tile), first = p.first_k(tile);
    for (int k = 0; k < num_k_blocks; ++k, state.advance()) {
      u64* full = &shared.full[state.stage];
      mbarrier_wait(&shared.empty[state.stage], state.parity ^ 1);
      if (idle) {
        mbarrier_arrive(full);
      } else {
        mbarrier_arrive_expect(full, bytes);
        operands.load(shared.stages[state.stage], full, tile, first + k * BLOCK_K);
      }
    }
  }
}

}  // namespace cometrt
