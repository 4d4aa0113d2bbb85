// What the planner's kernels read and write. Mirrored by plan_params in cometrt/kernels/params.py.
#pragma once

#include "common/geometry.cuh"
#include "protocol/plan_progress.cuh"

namespace cometrt {

struct PlanParams {
  Geometry g;
  // All ranks' routing tables: [size, max_tokens, topk] and [size]; `prepare` fills them.
  int* ids;
  float* weights;
  int* num_tokens;
  // Scratch. token_tile_counts [size, token tiles, num_experts]; counts [size, num_experts];
  // token_counts [size, ep]; list_start [num_experts], pair_list [max_tokens * topk]: this rank's
  // own tokens by expert; rank_rows [size, size + 1, local_experts]; rank_num_tiles [size];
  // rank_order, rank_tile_order_idx [size, max_tiles]; run_counts, run_starts [2 * size, max_tiles]
  // and column_tokens [2 * size]: columns of this rank as contributor, by source, then of this
  // home, by contributor; block_order_idx [size, blocks_per_home]: of a block's last tile;
  // first_order_idx [2 * size, max_tokens]: of the first tile that needs a token.
  int *token_tile_counts, *counts, *token_counts, *list_start, *pair_list;
  int *rank_rows, *rank_num_tiles, *rank_order, *rank_tile_order_idx;
  int *run_counts, *run_starts, *column_tokens, *block_order_idx;
  u32* first_order_idx;
  PlanProgress* progress;  // counts and token_counts are zero too when the kernel begins
  // All tables but row_weight lie in one piece of memory.
  int* tables;
  long long num_words;
  // The plan: fields of cometrt.plan.Plan in their order, filled with -1 (row_weight with 0).
  int *expert_offsets, *expert_rows, *row_pair;
  float* row_weight;
  int *pair_row, *out_num_tiles, *tile_expert, *tile_distance, *tile_order;
  int *pull_tokens, *pull_offsets, *send_tokens, *send_offsets, *send_base;
  int *push_blocks, *num_blocks, *staging_row, *staging_base, *out_num_tokens;
};

}  // namespace cometrt
