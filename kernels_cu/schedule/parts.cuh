// Parts of layer0's order of M-tiles, which are pulled, multiplied and pushed one behind the other.
#pragma once

#include "hopper/memory.cuh"

namespace cometrt {

// Where the index-th of `count` even parts begins: part_begin of cometrt/plan/turns.py.
__device__ inline int part_begin(int num_tiles, int index, int count) {
  return static_cast<int>(static_cast<long long>(num_tiles) * index / count);
}

// Mirrored by part_dtype in cometrt/kernels/params.py.
struct Part {
  const int* block_position;  // of the planner: where a block's last tile is; null where count is 1
  int index, count;
};

}  // namespace cometrt
