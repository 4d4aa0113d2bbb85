// Shapes that every kernel of a layer shares. Mirrored by geometry_dtype in
// cometrt/kernels/params.py; names as in docs/architecture.md, "Words".
#pragma once

#include "hopper/memory.cuh"

namespace cometrt {

struct Geometry {
  int rank, size, tp, ep;
  int num_experts, local_experts, topk, max_tokens;
  int hidden, local_intermediate, up_columns, gated;
  int block_m, block_tokens, capacity, max_tiles;
  int blocks_per_home, activation;
};

__device__ inline int ring_distance(const Geometry& g, int from, int to) {
  return (to - from + g.size) % g.size;
}

}  // namespace cometrt
