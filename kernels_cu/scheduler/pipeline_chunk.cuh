// Pipeline chunks: even ranges of the dispatch order that mode "chunked" pulls, multiplies and
// pushes one behind the other.
#pragma once

#include "hopper/memory.cuh"

namespace cometrt {

// The first order index of the index-th of `count` chunks: pipeline_chunk_begin of
// cometrt/plan/turns.py.
__device__ inline int pipeline_chunk_begin(int num_tiles, int index, int count) {
  return static_cast<int>(static_cast<long long>(num_tiles) * index / count);
}

// Mirrored by part_dtype in cometrt/kernels/params.py.
struct PipelineChunk {
  const int* block_order_idx;  // PlanParams'; null where count is 1
  int index, count;
};

}  // namespace cometrt
