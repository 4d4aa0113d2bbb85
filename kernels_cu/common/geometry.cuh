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
  int waves, unused;
};

__device__ inline int ring_distance(const Geometry& g, int from, int to) {
  return (to - from + g.size) % g.size;
}

// The largest ring distance of a wave of tiles: TileConfig.last_distances.
__device__ inline int last_distance(const Geometry& g, int wave) {
  if (g.waves == 1) return g.size - 1;
  return wave == 0 ? 0 : (wave * (g.size - 1) + g.waves - 2) / (g.waves - 1);
}

}  // namespace cometrt
