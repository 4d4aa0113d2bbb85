// Pipeline chunks of mode "chunked": even ranges of the dispatch order, whose transfers overlap
// with the GEMM of another chunk. Used by the tile order and by the row kernels of sequential/.
#pragma once

#include "hopper/memory.cuh"

namespace cometrt {

// The first order index of chunk `index` of `count`, as pipeline_chunk_begin of
// cometrt/plan/tile_order.py has it.
__device__ inline int pipeline_chunk_begin(int num_tiles, int index, int count) {
  return static_cast<int>(static_cast<long long>(num_tiles) * index / count);
}

// The chunk of a launch. Mirrored by pipeline_chunk_dtype in cometrt/kernels/params.py.
struct PipelineChunk {
  const int* block_order_idx;  // of PlanParams; null if count is 1
  int index, count;
};

}  // namespace cometrt
