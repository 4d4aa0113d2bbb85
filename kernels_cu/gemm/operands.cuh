// An operand policy says how a kind of GEMM finds its operands: which boxes the loading thread
// brings into a stage, where a warpgroup's parts lie in it, and how they step along K.
#pragma once

#include "gemm/tile.cuh"
#include "hopper/cluster.cuh"
#include "hopper/wgmma.cuh"

namespace cometrt {

// a [rows, K] and b [expert, columns, K], both with K innermost. `kGated`: an N-tile is 128 gate
// columns and the up columns that belong to them.
template <bool kGated>
struct RowsTimesWeights {
  const TensorMap *a, *a_half, *b;  // boxes of BLOCK_M rows, kHalfM rows, kHalfN columns
  // The next M-tiles of the expert read the same weights again; rows are read once more at most.
  u64 a_policy, b_policy;

  static constexpr u64 kStep = 2;  // of both descriptors, for the next 16 columns of K

  __device__ RowsTimesWeights(const TensorMap& a, const TensorMap& a_half, const TensorMap& b)
      : a(&a),
        a_half(&a_half),
        b(&b),
        a_policy(cache_policy<CacheHint::kEvictNormal>()),
        b_policy(cache_policy<CacheHint::kEvictLast>()) {}

  // Of A, into this CTA's stages. What a neighbour loads for both counts too.
  __device__ static u32 a_bytes(const WorkTile& tile) {
    return tile.rows > kHalfM ? sizeof(Stage::a) : sizeof(Stage::a) / 2;
  }

  // This CTA's halves of the K columns [c0, c0 + BLOCK_K). Coordinates innermost first.
  __device__ void load(Stage& stage, u64* full, const WorkTile& tile, int c0) const {
    const int row = tile.m_tile * BLOCK_M;
    if (tile.a() == kBothHalves) {
      const TensorMap* map = tile.rows > kHalfM ? a : a_half;
      tensor_load_4d(stage.a, map, c0, row, 0, 0, full, a_policy);
    } else if (tile.a() != kNoHalf) {
      const int half = tile.a() - kFirstHalf;
      tensor_load_4d_multicast(stage.a[half], a_half, c0, row + half * kHalfM, 0, 0, full, 0b11,
                               a_policy);
    }
    const auto column = [&](int half) {
      return kGated ? tile.n_tile * kHalfN : tile.n_tile * BLOCK_N + half * kHalfN;
    };
    if (tile.b() == kBothHalves) {
      for (int half = 0; half < 2; ++half) {
        tensor_load_4d(stage.b[half], b, c0, column(half), kGated ? half : 0, tile.expert, full,
                       b_policy);
      }
    } else {
      const int half = tile.b() - kFirstHalf;
      tensor_load_4d_multicast(stage.b[half], b, c0, column(half), kGated ? half : 0, tile.expert,
                               full, 0b11, b_policy);
    }
  }

  __device__ static u64 a_descriptor(const Stage& stage, int warpgroup) {
    return wgmma_descriptor(stage.a[warpgroup]);
  }
  __device__ static u64 b_descriptor(const Stage& stage) { return wgmma_descriptor(stage.b); }
};

}  // namespace cometrt
