// What the kernel that orders a GEMM's tiles reads and writes.
#pragma once

#include "gemm/tile.cuh"

namespace cometrt {

// Mirrored by turns_params in cometrt/kernels/params.py.
struct TurnsParams {
  const int *tile_order, *num_tiles, *tile_expert, *expert_offsets, *expert_rows;
  const u32* ok;  // 0: the plan is wrong, there is nothing to do; null: it is right
  WorkItem* items;
  int *num_turns, *progress;
  int num_columns, max_run, backwards, chunk;  // chunk: column tiles walked at a time
};

}  // namespace cometrt
