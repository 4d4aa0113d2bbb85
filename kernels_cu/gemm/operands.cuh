// Operand policies: which boxes the load thread brings into a stage, and the wgmma descriptors of a
// stage. Used by produce() and consume(); loads complete on Shared::full.
#pragma once

#include "gemm/tile.cuh"
#include "hopper/cluster.cuh"
#include "hopper/wgmma.cuh"

namespace cometrt {

// A of the GEMMs over rows: a [rows, K], K innermost.
struct RowsOperand {
  const TensorMap *a, *a_half;  // boxes of BLOCK_M rows, kHalfM rows
  u64 a_policy;                 // rows are read at most twice

  static constexpr bool kByKind = false;  // whether the policy depends on the tile's kind
  static constexpr Major kMajorA = Major::kK;
  static constexpr u64 kStepA = 2;  // descriptor increment for the next 16 columns of K

  __device__ RowsOperand(const TensorMap& a, const TensorMap& a_half)
      : a(&a), a_half(&a_half), a_policy(cache_policy<CacheHint::kEvictNormal>()) {}

  // Bytes of A that arrive in a stage of this CTA, those that the neighbour multicasts included.
  __device__ static u32 a_bytes(const WorkTile& tile) {
    return tile.rows > kHalfM ? sizeof(Stage::a) : sizeof(Stage::a) / 2;
  }

  // Loads this CTA's halves of columns [c0, c0 + BLOCK_K) of K, as WorkTile::a() names them. A half
  // that both CTAs use is multicast to both (mask 0b11).
  __device__ void load_a(Stage& stage, u64* full, const WorkTile& tile, int c0) const {
    const int row = tile.m_tile * BLOCK_M;
    if (tile.a() == kBothHalves) {
      const TensorMap* map = tile.rows > kHalfM ? a : a_half;
      tensor_load_4d(stage.a, map, c0, row, 0, 0, full, a_policy);
    } else if (tile.a() != kNoHalf) {
      const int half = tile.a() - kFirstHalf;
      tensor_load_4d_multicast(stage.a[half], a_half, c0, row + half * kHalfM, 0, 0, full, 0b11,
                               a_policy);
    }
  }

  __device__ static u64 a_descriptor(const Stage& stage, int warpgroup) {
    return wgmma_descriptor(stage.a[warpgroup]);
  }
};

// Forward: b [expert, columns, K], K innermost. `kGated`: an N-tile is kHalfN gate columns and
// the up columns that belong to them.
template <bool kGated>
struct RowsTimesWeights : RowsOperand {
  const TensorMap* b;  // boxes of kHalfN columns
  u64 b_policy;

  static constexpr Major kMajorB = Major::kK;
  static constexpr u64 kStepB = 2;

  // reads_once: no later M-tile of the expert reads the same weights again.
  __device__ RowsTimesWeights(const TensorMap& a, const TensorMap& a_half, const TensorMap& b,
                              bool reads_once)
      : RowsOperand(a, a_half),
        b(&b),
        b_policy(reads_once ? cache_policy<CacheHint::kEvictFirst>()
                            : cache_policy<CacheHint::kEvictLast>()) {}

  __device__ void load(Stage& stage, u64* full, const WorkTile& tile, int c0) const {
    load_a(stage, full, tile, c0);
    load_b(stage, full, tile, c0);
  }
  // This CTA's halves of B, as WorkTile::b() names them.
  __device__ void load_b(Stage& stage, u64* full, const WorkTile& tile, int c0) const {
    if (tile.b() == kBothHalves) {
      for (int half = 0; half < 2; ++half) {
        tensor_load_4d(stage.b[half], b, c0, column(tile, half), kGated ? half : 0, tile.expert,
                       full, b_policy);
      }
    } else {
      const int half = tile.b() - kFirstHalf;
      tensor_load_4d_multicast(stage.b[half], b, c0, column(tile, half), kGated ? half : 0,
                               tile.expert, full, 0b11, b_policy);
    }
  }
  // Brings the same boxes to L2.
  __device__ void prefetch_b(const WorkTile& tile, int c0) const {
    for (int half = 0; half < 2; ++half) {
      if (tile.b() != kBothHalves && half != tile.b() - kFirstHalf) continue;
      tensor_prefetch_4d(b, c0, column(tile, half), kGated ? half : 0, tile.expert, b_policy);
    }
  }
  __device__ static int column(const WorkTile& tile, int half) {
    return kGated ? tile.n_tile * kHalfN : tile.n_tile * BLOCK_N + half * kHalfN;
  }

  __device__ static u64 b_descriptor(const Stage& stage) { return wgmma_descriptor(stage.b); }
};

}  // namespace cometrt
