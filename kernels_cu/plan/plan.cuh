// What the planner's kernels read and write. Mirrored by plan_params in cometrt/kernels/params.py.
#pragma once

#include "common/geometry.cuh"

namespace cometrt {

// Lists of items, each with a counter from which blocks take them.
enum WorkList : int {
  kCountList,
  kClearList,
  kTileList,
  kPlaceList,
  kSumList,
  kOrderList,
  kSlotList,
  kNumLists
};
// A step ends when its items are done, whichever blocks did them.
enum PlanStep : int { kCounted, kTiled, kPlaced, kSummed, kPlanned, kNumSteps };

// All zero when the kernel begins. Mirrored by plan_progress in cometrt/kernels/params.py.
struct PlanProgress {
  // The first wrong pair, as ~pair; (rows << 16 | 0xffff - rank) of the largest need over capacity;
  // 0: none.
  u64 wrong_pair, largest_need;
  u32 taken[kNumLists], done[kNumSteps];
};

struct PlanParams {
  Geometry g;
  // All ranks' tables: [size, max_tokens, topk] and [size]; `prepare` fills them.
  int* ids;
  float* weights;
  int* num_tokens;
  // Scratch. chunk_counts [size, chunks, num_experts]; counts [size, num_experts]; token_counts
  // [size, ep]; list_start [num_experts], pair_list [max_tokens * topk]: this rank's own tokens by
  // expert; rank_rows [size, size + 1, local_experts]; rank_num_tiles [size]; rank_order,
  // rank_tile_position [size, max_tiles]; segment_counts, segment_before [2 * size, max_tiles]:
  // columns, of this rank as contributor by source, then of this home by contributor; column_tokens
  // [2 * size]; block_position [size, blocks_per_home]; first_position [2 * size, max_tokens].
  int *chunk_counts, *counts, *token_counts, *list_start, *pair_list;
  int *rank_rows, *rank_num_tiles, *rank_order, *rank_tile_position;
  int *segment_counts, *segment_before, *column_tokens, *block_position;
  u32* first_position;
  PlanProgress* progress;  // counts and token_counts are zero too when the kernel begins
  // All tables but row_weight lie in one piece of memory.
  int* tables;
  long long num_words;
  // The plan: fields of cometrt.plan.Plan in their order, filled with -1 (row_weight with 0).
  int *expert_offsets, *expert_rows, *row_pair;
  float* row_weight;
  int *pair_row, *out_num_tiles, *tile_expert, *tile_distance, *tile_order;
  int *pull_tokens, *pull_offsets, *send_tokens, *send_offsets, *send_base;
  int *push_blocks, *num_blocks, *home_slot, *home_base, *out_num_tokens;
};

}  // namespace cometrt
