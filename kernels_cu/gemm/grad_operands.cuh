// Operand policies of the backward. Operands whose K is not innermost in memory are not transposed.
// TMA loads them in boxes of BLOCK_K rows by 64 columns, and wgmma reads them MN-major.
#pragma once

#include "gemm/operands.cuh"
#include "gemm/wgrad_problem.cuh"

namespace cometrt {

constexpr int kBoxColumns = 64, kBoxElements = kBoxColumns * BLOCK_K;
static_assert(kBoxElements * sizeof(__nv_bfloat16) == 8192, "wgmma_descriptor_mn");

// Loads neighbouring boxes of an operand, the first one at `row` and `column` of `expert`.
struct BoxLoad {
  const TensorMap* map;  // of single boxes
  int row, column, expert;
  u64* full;
  u64 policy;

  // Loads `count` boxes to `to` and the memory behind it. `multicast`: for both CTAs.
  __device__ void operator()(__nv_bfloat16* to, int count, bool multicast) const {
    for (int i = 0; i < count; ++i, to += kBoxElements) {
      const int at = column + i * kBoxColumns;
      if (multicast) {
        tensor_load_4d_multicast(to, map, at, row, expert, 0, full, 0b11, policy);
      } else {
        tensor_load_4d(to, map, at, row, expert, 0, full, policy);
      }
    }
  }
};

// Loads this CTA's halves of B, as WorkTile::b() names them: BLOCK_K rows of the N-tile's columns.
// `of_tile` begins at the N-tile's first column.
__device__ inline void load_b_boxes(Stage& stage, const WorkTile& tile, const BoxLoad& of_tile) {
  constexpr int kBoxes = kHalfN / kBoxColumns;
  if (tile.b() == kBothHalves) {
    of_tile(stage.b[0], 2 * kBoxes, false);
  } else {
    const int half = tile.b() - kFirstHalf;
    BoxLoad of_half = of_tile;
    of_half.column += half * kHalfN;
    of_half(stage.b[half], kBoxes, true);
  }
}

// Activation gradients: a [rows, K] b [expert, K, columns]. b is the forward's weight as it lies in
// memory; its K and its columns exchange their roles.
struct RowsTimesTransposedWeights : RowsOperand {
  const TensorMap* b;  // boxes
  u64 b_policy;        // the next M-tiles of the expert read the same weights again

  static constexpr Major kMajorB = Major::kMN;
  static constexpr u64 kStepB = 128;

  __device__ RowsTimesTransposedWeights(const TensorMap& a, const TensorMap& a_half,
                                        const TensorMap& b)
      : RowsOperand(a, a_half), b(&b), b_policy(cache_policy<CacheHint::kEvictLast>()) {}

  __device__ void load(Stage& stage, u64* full, const WorkTile& tile, int k) const {
    load_a(stage, full, tile, k);
    load_b_boxes(stage, tile, {b, k, tile.n_tile * BLOCK_N, tile.expert, full, b_policy});
  }

  __device__ static u64 b_descriptor(const Stage& stage) { return wgmma_descriptor_mn(stage.b); }
};

// Weight gradients: a [rows, M]^T b [rows, columns], where K is the rows of an expert.
struct TransposedRowsTimesRows {
  const WgradMaps& maps;
  u64 policy;

  static constexpr bool kByKind = false;
  static constexpr Major kMajorA = Major::kMN, kMajorB = Major::kMN;
  static constexpr u64 kStepA = 128, kStepB = 128;
  static_assert(kHalfM == kBoxColumns, "a half of A is a box");

  __device__ explicit TransposedRowsTimesRows(const WgradMaps& maps)
      : maps(maps), policy(cache_policy<CacheHint::kEvictNormal>()) {}

  __device__ static u32 a_bytes(const WorkTile& tile) { return RowsOperand::a_bytes(tile); }

  __device__ void load(Stage& stage, u64* full, const WorkTile& tile, int row) const {
    BoxLoad a{&maps.a[tile.kind()], row, tile.m_tile * BLOCK_M, 0, full, policy};
    if (tile.a() == kBothHalves) {
      a(stage.a[0], tile.rows > kHalfM ? 2 : 1, false);
    } else if (tile.a() != kNoHalf) {
      const int half = tile.a() - kFirstHalf;
      a.column += half * kHalfM;
      a(stage.a[half], 1, true);
    }
    load_b_boxes(stage, tile, {&maps.b[tile.kind()], row, tile.n_tile * BLOCK_N, 0, full, policy});
  }

  __device__ static u64 a_descriptor(const Stage& stage, int warpgroup) {
    return wgmma_descriptor_mn(stage.a[warpgroup]);
  }
  __device__ static u64 b_descriptor(const Stage& stage) { return wgmma_descriptor_mn(stage.b); }
};

}  // namespace cometrt
