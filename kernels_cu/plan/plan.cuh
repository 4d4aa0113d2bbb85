// Parameters of the planner's kernels: routing tables, scratch and the plan. Mirrored by
// plan_params_dtype in cometrt/kernels/params.py.
#pragma once

#include "common/geometry.cuh"
#include "protocol/plan_progress.cuh"

namespace cometrt {

struct PlanParams {
  Geometry g;
  // Routing of all ranks: [size, max_tokens, topk] and [size]. `prepare` copies it from the heaps,
  // `prepare_small` only for the report of a failure.
  int* ids;
  float* weights;
  int* num_tokens;
  // Scratch.
  //   token_tile_counts [size, token tiles, num_experts]: pairs, later their prefix sums
  //   counts [size, num_experts]: pairs; token_counts [size, ep]: tokens with a pair in an EP group
  //   pair_list [max_tokens * topk]: this rank's own tokens by expert; list_start [num_experts]
  //   rank_rows [size, size + 1, local_experts]: on each rank, the first row of a local expert from
  //     the source at a ring distance
  //   rank_num_tiles [size]; rank_order [size, max_tiles]: tile * local_experts + expert by order
  //     index; rank_tile_order_idx [size, max_tiles]: order index by tile
  //   run_counts, run_starts [2 * size, max_tiles], column_tokens [2 * size]: tokens of runs. A
  //   column
  //     is a source with this rank as contributor, then a contributor with this rank as home
  //   block_order_idx [size, blocks_per_home]: order index of the last tile of a pushed block
  //   first_order_idx [2 * size, max_tokens]: order index of the first tile that needs a token
  int *token_tile_counts, *counts, *token_counts, *list_start, *pair_list;
  int *rank_rows, *rank_num_tiles, *rank_order, *rank_tile_order_idx;
  int *run_counts, *run_starts, *column_tokens, *block_order_idx;
  u32* first_order_idx;
  PlanProgress* progress;  // like counts and token_counts, zero when the kernel begins
  // All tables of the plan but row_weight, as contiguous words.
  int* tables;
  long long num_words;
  // The plan: fields of cometrt.plan.Plan in their order. Unused entries are -1 (0 in row_weight).
  int *expert_offsets, *expert_rows, *row_pair;
  float* row_weight;
  int *pair_row, *out_num_tiles, *tile_expert, *tile_distance, *tile_order;
  int *pull_tokens, *pull_offsets, *send_tokens, *send_offsets, *send_base;
  int *push_blocks, *num_blocks, *block_tokens, *staging_row, *staging_base, *out_num_tokens;
};

// Where plan_small.cu keeps the arrays of PlanParams that its steps read again: byte offsets in
// shared memory. Mirrored by shared_tables_dtype in cometrt/kernels/params.py.
struct SharedTables {
  int ids, weights, num_tokens;
  int token_tile_counts, counts, token_counts, list_start, pair_list;
  int rank_rows, rank_num_tiles, rank_order, rank_tile_order_idx;
  int run_counts, run_starts, column_tokens, first_order_idx;
  int expert_offsets, expert_rows, row_pair, out_num_tiles, tile_expert, tile_order;
  int pull_offsets, send_offsets, block_tokens, staging_base;
  // Counters that begin as 0 lie in the first zero_bytes. Behind them lie kept_bytes of the plan:
  // the first of PlanParams::tables, in the same layout. Scratch of team i begins at team + i *
  // team_bytes.
  int zero_bytes, kept_bytes, team, team_bytes;
};

}  // namespace cometrt
