// One thread of a CTA loads the operands of each work tile, a stage of BLOCK_K columns at a time.
#pragma once

#include "gemm/tile_scheduler.cuh"

namespace cometrt {

// What a tile reads of K columns [c0, c0 + BLOCK_K). Coordinates innermost first.
struct Operands {
  const TensorMap *a, *a_half, *b;  // boxes of BLOCK_M rows, kHalfM rows, kHalfN columns
  // The next M-tiles of the expert read the same weights again; rows are read once more at most.
  u64 a_policy, b_policy;

  __device__ Operands(const TensorMap& a, const TensorMap& a_half, const TensorMap& b)
      : a(&a),
        a_half(&a_half),
        b(&b),
        a_policy(cache_policy<CacheHint::kEvictNormal>()),
        b_policy(cache_policy<CacheHint::kEvictLast>()) {}
};

// This CTA's halves of what the tile reads.
template <bool kGated>
__device__ inline void load_stage(Stage& stage, u64* full, const Operands& maps,
                                  const WorkTile& tile, int c0) {
  const int row = tile.m_tile * BLOCK_M;
  if (tile.a() == kBothHalves) {
    const TensorMap* map = tile.rows > kHalfM ? maps.a : maps.a_half;
    tensor_load_4d(stage.a, map, c0, row, 0, 0, full, maps.a_policy);
  } else if (tile.a() != kNoHalf) {
    const int half = tile.a() - kFirstHalf;
    tensor_load_4d_multicast(stage.a[half], maps.a_half, c0, row + half * kHalfM, 0, 0, full, 0b11,
                             maps.a_policy);
  }
  const auto column = [&](int half) {
    return kGated ? tile.n_tile * kHalfN : tile.n_tile * BLOCK_N + half * kHalfN;
  };
  if (tile.b() == kBothHalves) {
    for (int half = 0; half < 2; ++half) {
      tensor_load_4d(stage.b[half], maps.b, c0, column(half), kGated ? half : 0, tile.expert, full,
                     maps.b_policy);
    }
  } else {
    const int half = tile.b() - kFirstHalf;
    tensor_load_4d_multicast(stage.b[half], maps.b, c0, column(half), kGated ? half : 0,
                             tile.expert, full, 0b11, maps.b_policy);
  }
}

// `kGated`: an N-tile is 128 gate columns and the up columns that belong to them.
template <bool kGated, typename Hooks>
__device__ inline void produce(Shared& shared, const GemmParams& p, const Operands& maps,
                               const Hooks& hooks) {
  TileScheduler<1> scheduler(shared);
  StageState at;
  WorkTile tile;
  while (scheduler.next(tile)) {
    const bool idle = tile.m_tile < 0;
    const u32 a_bytes = tile.rows > kHalfM ? sizeof(Stage::a) : sizeof(Stage::a) / 2;
    if (!idle) hooks.before_loads(tile);
    for (int k = 0; k < p.num_k_blocks; ++k, at.advance()) {
      u64* full = &shared.full[at.stage];
      mbarrier_wait(&shared.empty[at.stage], at.parity ^ 1);
      if (idle) {
        mbarrier_arrive(full);
      } else {
        mbarrier_arrive_expect(full, a_bytes + sizeof(Stage::b));
        load_stage<kGated>(shared.stages[at.stage], full, maps, tile, k * BLOCK_K);
      }
    }
  }
}

}  // namespace cometrt
