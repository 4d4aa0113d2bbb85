// Weight gradients: out[expert] [num_rows, num_columns] = a^T b over the expert's rows of both.
#pragma once

#include "gemm/tile.cuh"
#include "hopper/bulk.cuh"

namespace cometrt {

constexpr int kMaxWgrads = 2;  // in one launch: gradients of the up and down weights
// Kind of the first weight gradient in a launch that begins with the up dgrad.
constexpr int kFirstWgrad = 1;

// One weight's gradient.
struct WgradProblem {
  void* out;  // [experts, num_rows, num_columns], bf16 or float32
  int num_rows, num_columns;
  int is_float32;
  int expert_stride;  // rows of out from one expert to the next
};

// The K blocks of an expert, row set by row set. Tables are read where a set begins.
struct RowSetBlocks {
  const int *offsets, *rows;  // of the expert in the next set
  int num_experts;            // in a set
  int end;                    // K blocks of the sets so far
  int origin;                 // where K block 0 would begin if it were of the set that k is in

  // As KBlocks::first. k is less than the K blocks of all sets.
  __device__ int first(int k) {
    while (k >= end) {
      origin = *offsets - end * BLOCK_K;
      end += (*rows + BLOCK_K - 1) / BLOCK_K;
      offsets += num_experts, rows += num_experts;
    }
    return origin + k * BLOCK_K;
  }
};

// M-tiles are rows of out[expert]. K is the expert's rows in each row set, one after the other:
// from the offset of its plan expert there, a multiple of BLOCK_M, to the next multiple of BLOCK_K
// behind the last row. Padding rows up to there are zero in both operands. Mirrored by
// wgrad_params_dtype in cometrt/kernels/params.py.
struct WgradParams : TileList {
  const int *expert_offsets, *expert_rows;  // [row_sets, num_experts], of plan experts
  WgradProblem problems[kMaxWgrads];
  int num_problems, num_experts, row_sets;
  int raster_group;  // N-tiles that all M-tiles of an expert take before its next ones; even
  int accumulate;    // 1: out += a^T b
  int unused;

  static constexpr bool kMayBeEmpty = true;

  __device__ const WgradProblem& problem_of(const WorkTile& tile) const {
    return problems[tile.kind()];
  }
  // Whether all results of the launch are bf16 and overwrite the old values.
  __device__ bool overwrites_bf16() const {
    return !accumulate && !problems[0].is_float32 && (num_problems == 1 || !problems[1].is_float32);
  }
  // Rows of an expert in all sets, each rounded up to a multiple of `multiple`.
  __device__ int rows_of(int expert, int multiple = 1) const {
    int rows = 0;
#pragma unroll 1
    for (int set = 0; set < row_sets; ++set) {
      rows += (expert_rows[set * num_experts + expert] + multiple - 1) / multiple * multiple;
    }
    return rows;
  }
  __device__ int num_k_blocks(const WorkTile& tile) const {
    return rows_of(tile.expert, BLOCK_K) / BLOCK_K;
  }
  __device__ RowSetBlocks k_blocks(const WorkTile& tile) const {
    return {expert_offsets + tile.expert, expert_rows + tile.expert, num_experts, 0, 0};
  }
};

// Tensor maps by problem. a, b: boxes of BLOCK_K rows by 64 columns. out: boxes of 16 rows by 128
// bytes; its rows are [experts * num_rows / 8, 4, 2], where [g, j, i] is row 8 * g + 4 * i + j.
struct WgradMaps {
  TensorMap a[kMaxWgrads], b[kMaxWgrads], out[kMaxWgrads];
};

}  // namespace cometrt
