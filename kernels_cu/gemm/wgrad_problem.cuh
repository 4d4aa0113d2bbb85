// Weight gradients: out[expert] [num_rows, num_columns] = a^T b over the expert's rows of both.
#pragma once

#include "gemm/tile.cuh"
#include "hopper/bulk.cuh"

namespace cometrt {

constexpr int kMaxWgrads = 2;  // of one launch: those of the up and of the down weights
// Kind of the first weight gradient in a launch that begins with the up dgrad.
constexpr int kFirstWgrad = 1;

struct WgradProblem {
  void* out;  // [experts, num_rows, num_columns], bf16 or float32
  int num_rows, num_columns;
  int is_float32;
  int expert_stride;  // rows of out from one expert to the next
};

// Rows of a work tile are those of out[expert]. K is the expert's rows: from its offset, a multiple
// of BLOCK_M, to the next multiple of BLOCK_K behind them. Padding rows up to there are zero in
// both operands. Mirrored by wgrad_params_dtype in cometrt/kernels/params.py.
struct WgradParams : TileList {
  const int *expert_offsets, *expert_rows;
  WgradProblem problems[kMaxWgrads];
  int num_problems, num_experts;
  int raster_group;  // N-tiles that all M-tiles of an expert take before the next ones; even
  int accumulate;    // then out += a^T b

  static constexpr bool kMayBeEmpty = true;

  __device__ const WgradProblem& problem_of(const WorkTile& tile) const {
    return problems[tile.kind()];
  }
  // All results of the launch are bf16, and what was there is replaced.
  __device__ bool overwrites_bf16() const {
    return !accumulate && !problems[0].is_float32 && (num_problems == 1 || !problems[1].is_float32);
  }
  __device__ int num_k_blocks(const WorkTile& tile) const {
    return (expert_rows[tile.expert] + BLOCK_K - 1) / BLOCK_K;
  }
  __device__ int first_k(const WorkTile& tile) const { return expert_offsets[tile.expert]; }
};

// Boxes of 64 columns by BLOCK_K rows of each problem's operands. Boxes of 128 bytes by 16 rows of
// out, whose rows are [experts * num_rows / 8, 4, 2]: row 4 * i + j of eight is [j, i].
struct WgradMaps {
  TensorMap a[kMaxWgrads], b[kMaxWgrads], out[kMaxWgrads];
};

}  // namespace cometrt
