// Shapes of one rank's layer, part of the parameters of nearly every kernel. Mirrored by
// geometry_dtype in cometrt/kernels/params.py.
#pragma once

#include "hopper/memory.cuh"

namespace cometrt {

struct Geometry {
  int rank, size, tp, ep;
  int num_experts, local_experts, topk, max_tokens;
  int hidden, local_intermediate, up_columns, gated;
  int block_m, block_tokens, capacity, max_tiles;
  int blocks_per_home, activation;
  int num_phases, min_token_blocks;
};

// Tokens of a token block, as TileConfig.tokens_per_block has it. num_tokens: of the rank with
// most.
__device__ inline int tokens_per_block(const Geometry& g, int num_tokens) {
  const int wanted = (num_tokens + g.min_token_blocks - 1) / g.min_token_blocks;
  return max(1, min(g.block_tokens, wanted));
}

// (to - from) mod ranks: 0 for the rank itself.
__device__ inline int ring_distance(const Geometry& g, int from, int to) {
  return to >= from ? to - from : to - from + g.size;
}

// The rank at ring distance d from rank `from`.
__device__ inline int rank_at(const Geometry& g, int from, int d) {
  return from + d < g.size ? from + d : from + d - g.size;
}

// The largest ring distance of a phase of the dispatch order, as TileConfig.last_distances has it.
__device__ inline int last_distance(const Geometry& g, int phase) {
  if (g.num_phases == 1) return g.size - 1;
  return phase == 0 ? 0 : (phase * (g.size - 1) + g.num_phases - 2) / (g.num_phases - 1);
}

// The first phase whose last_distance is at least d.
__device__ inline int phase_of(const Geometry& g, int d) {
  return d == 0 || g.num_phases == 1 ? 0 : (d - 1) * (g.num_phases - 1) / (g.size - 1) + 1;
}

}  // namespace cometrt
