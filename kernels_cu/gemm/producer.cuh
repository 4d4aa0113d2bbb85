// The producer: the load warp's first thread loads the operands of each work tile, a stage of
// BLOCK_K columns at a time. It waits for Shared::empty (all multiplying warps of the cluster) and
// arrives on Shared::full (the multiplying warps of this CTA).
#pragma once

#include "gemm/operands.cuh"
#include "gemm/tile_scheduler.cuh"

namespace cometrt {

// K blocks of a CTA's first weights that come to L2 while the tile's rows are on their way, besides
// those that fit into the stages.
constexpr int kBlocksPrefetched = 4;

// For GEMMs whose operands are complete before the launch.
struct AlwaysReady {
  static constexpr bool kLoadsBAhead = false;
  __device__ void wait(const WorkTile&) {}
};

// While the rows of a tile are not there yet: loads its B into stages that come free, from column 0
// of K on, and prefetches more of it. Returns how many K blocks wait for their A alone, whose bytes
// are expected already.
template <typename Operands, typename TileReady>
__device__ inline int load_b_ahead(Shared& shared, StageState state, const Operands& operands,
                                   const TileReady& ready, const WorkTile& tile, int num_k_blocks,
                                   bool prefetches) {
  const u32 bytes = operands.a_bytes(tile) + sizeof(Stage::b);
  int k = 0;
  for (; k < min(num_k_blocks, kStages) && !ready.is_ready(tile); ++k, state.advance()) {
    u64* full = &shared.full[state.stage];
    mbarrier_wait(&shared.empty[state.stage], state.parity ^ 1);
    mbarrier_arrive_expect(full, bytes);
    operands.load_b(shared.stages[state.stage], full, tile, k * BLOCK_K);
  }
  const int end = prefetches ? min(num_k_blocks, k + kBlocksPrefetched) : 0;
  for (int i = k; i < end; ++i) operands.prefetch_b(tile, i * BLOCK_K);
  return k;
}

// `ready.wait(tile)` returns when the tile's operands are in global memory. An idle CTA (m_tile -1)
// still completes its stages, since its neighbour's multicasts and arrivals count on them.
template <typename Params, typename Operands, typename TileReady>
__device__ inline void produce(Shared& shared, const Params& p, const Operands& operands,
                               TileReady& ready) {
  TileScheduler<1> scheduler(shared);
  StageState state;
  WorkTile tile;
  bool is_first = true;
  while (scheduler.next(tile)) {
    const bool idle = tile.m_tile < 0;
    const u32 bytes = operands.a_bytes(tile) + sizeof(Stage::b);
    if (!TileReady::kLoadsBAhead && !idle) ready.wait(tile);
    const int num_k_blocks = p.num_k_blocks(tile);
    auto k_blocks = p.k_blocks(tile);
    int k = 0;
    if constexpr (TileReady::kLoadsBAhead) {
      const int ahead =
          idle ? 0 : load_b_ahead(shared, state, operands, ready, tile, num_k_blocks, is_first);
      is_first = false;
      if (!idle) ready.wait(tile);
      for (; k < ahead; ++k, state.advance()) {
        const int stage = state.stage;
        operands.load_a(shared.stages[stage], &shared.full[stage], tile, k * BLOCK_K);
      }
    }
    for (; k < num_k_blocks; ++k, state.advance()) {
      u64* full = &shared.full[state.stage];
      mbarrier_wait(&shared.empty[state.stage], state.parity ^ 1);
      if (idle) {
        mbarrier_arrive(full);
      } else {
        mbarrier_arrive_expect(full, bytes);
        operands.load(shared.stages[state.stage], full, tile, k_blocks.first(k));
      }
    }
  }
}

}  // namespace cometrt
