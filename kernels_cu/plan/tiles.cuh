// Step 2 of the planner: tiles, orders and offsets of all ranks. They follow from pair counts
// alone.
#pragma once

#include "plan/token_tile.cuh"

namespace cometrt {

// Rows and tiles of one rank's experts, in shared memory.
struct RankTiles {
  const Geometry& g;
  Divisor block_m;
  int* before;      // [size + 1, local_experts]: rows from sources nearer than d
  int* order_idx;   // [num_phases, local_experts]: order index of the first tile
  int* first_tile;  // [local_experts]

  __device__ RankTiles(const Geometry& geometry, int* shared)
      : g(geometry), block_m(g.block_m), before(shared) {
    order_idx = before + (g.size + 1) * g.local_experts;
    first_tile = order_idx + g.num_phases * g.local_experts;
  }
  __device__ int rows(int expert) const { return before[g.size * g.local_experts + expert]; }
  // Tiles of the expert whose rows all come from ring distances up to d.
  __device__ int tiles_within(int d, int expert) const {
    const int end = before[(d + 1) * g.local_experts + expert], all = rows(expert);
    return block_m.quotient(end == all ? all + g.block_m - 1 : end);
  }
  // Ring distance of the farthest row of the expert's index-th tile.
  __device__ int tile_distance(int expert, int index) const {
    const int end = min((index + 1) * g.block_m, rows(expert));
    int d = 0;
    while (before[(d + 1) * g.local_experts + expert] < end) ++d;
    return d;
  }
  // Tiles of the expert in phases [0, phase]; phase -1: none.
  __device__ int tiles_upto_phase(int phase, int expert) const {
    return phase < 0 ? 0 : tiles_within(last_distance(g, phase), expert);
  }
  // Order index of the expert's index-th tile, whose farthest row has ring distance d.
  __device__ int tile_order_idx(int expert, int index, int d) const {
    const int phase = phase_of(g, d);
    return order_idx[phase * g.local_experts + expert] + index -
           tiles_upto_phase(phase - 1, expert);
  }
};

// Step 2, a team per rank c. Orders rank c's tiles. For this rank it also writes the plan's
// tables.
__device__ inline void make_tiles(const PlanParams& p, const PlanTeam& team, int c, int* shared) {
  const RankTiles tiles(p.g, shared);
  const int experts = p.g.local_experts, size = p.g.size, thread = team.thread;
  const int first_expert = c / p.g.tp * experts;
  const Divisor by_experts(experts);
#pragma unroll 1
  for (int i = thread; i < size * experts; i += kTokenTile) {
    const int source = rank_at(p.g, c, by_experts.quotient(i)), e = by_experts.remainder(i);
    tiles.before[experts + i] = p.counts[source * p.g.num_experts + first_expert + e];
  }
  team.sync();
#pragma unroll 1
  for (int e = thread; e < experts; e += kTokenTile) {
    int sum = tiles.before[e] = 0;
#pragma unroll 1
    for (int d = 1; d <= size; ++d) {
      sum += tiles.before[d * experts + e];
      tiles.before[d * experts + e] = sum;
    }
  }
  team.sync();
  int num_tiles = 0;  // order indices by (phase, expert)
#pragma unroll 1
  for (int first = 0; first < p.g.num_phases * experts; first += kTokenTile) {
    const int i = first + thread, phase = by_experts.quotient(i), e = by_experts.remainder(i);
    const bool valid = i < p.g.num_phases * experts;
    const int count =
        valid ? tiles.tiles_upto_phase(phase, e) - tiles.tiles_upto_phase(phase - 1, e) : 0;
    int total;
    const int before = team.scan(count, &total);
    if (valid) tiles.order_idx[i] = num_tiles + before;
    num_tiles += total;
  }
  int first_tile = 0;  // by expert
#pragma unroll 1
  for (int first = 0; first < experts; first += kTokenTile) {
    const int e = first + thread;
    const int count = e < experts ? tiles.tiles_within(size - 1, e) : 0;
    int total;
    const int before = team.scan(count, &total);
    if (e < experts) tiles.first_tile[e] = first_tile + before;
    first_tile += total;
  }
  if (thread == 0) {
    p.rank_num_tiles[c] = num_tiles;
    const u64 need = static_cast<u64>(num_tiles) * p.g.block_m;
    if (need > static_cast<u64>(p.g.capacity)) {  // the largest need wins, then the lowest rank
      atomicMax(&p.progress->largest_need, need << 16 | static_cast<u64>(0xffff - c));
    }
  }
  team.sync();
  if (num_tiles > p.g.max_tiles) return;
  const bool mine = c == p.g.rank;
#pragma unroll 1
  for (int i = thread; i < (size + 1) * experts; i += kTokenTile) {
    const int row = tiles.first_tile[by_experts.remainder(i)] * p.g.block_m + tiles.before[i];
    p.rank_rows[rank_rows_idx(p, c, 0, i)] = row;
  }
  const long long first_of_rank = static_cast<long long>(c) * p.g.max_tiles;
  const int lanes = max(1, kTokenTile / experts);  // threads of an expert
#pragma unroll 1
  for (int e = thread / lanes; e < experts; e += kTokenTile / lanes) {
    const int num_tiles_of_expert = tiles.tiles_within(size - 1, e);
#pragma unroll 1
    for (int index = thread % lanes; index < num_tiles_of_expert; index += lanes) {
      const int d = tiles.tile_distance(e, index), order_idx = tiles.tile_order_idx(e, index, d);
      const int tile = tiles.first_tile[e] + index;
      p.rank_order[first_of_rank + order_idx] = tile * experts + e;
      p.rank_tile_order_idx[first_of_rank + tile] = order_idx;
      if (!mine) continue;
      p.tile_expert[tile] = e;
      p.tile_distance[tile] = d;
      p.tile_order[order_idx] = tile;
    }
  }
  if (!mine) return;
#pragma unroll 1
  for (int e = thread; e < experts; e += kTokenTile) {
    p.expert_offsets[e] = tiles.first_tile[e] * p.g.block_m;
    p.expert_rows[e] = tiles.rows(e);
  }
  if (thread == 0) {
    p.expert_offsets[experts] = num_tiles * p.g.block_m;
    p.out_num_tiles[0] = num_tiles;
  }
}

// Step 2, one team. Offsets of staging rows, of sends and of the lists of own tokens by expert.
__device__ inline void make_bases(const PlanParams& p, const PlanTeam& team, int* tokens) {
  const int size = p.g.size, ep = p.g.ep, tp = p.g.tp, rank = p.g.rank, thread = team.thread;
#pragma unroll 1
  for (int i = thread; i < size * ep; i += kTokenTile) tokens[i] = p.token_counts[i];
#pragma unroll 1
  for (int s = thread; s < size; s += kTokenTile) p.out_num_tokens[s] = p.num_tokens[s];
  team.sync();
  // A home's staging buffer: contributors by ring distance. The home's own sum is not staged.
#pragma unroll 1
  for (int home = thread; home < size; home += kTokenTile) {
    int base = 0;
    if (home == rank) p.send_base[home] = p.staging_base[0] = 0;
#pragma unroll 1
    for (int d = 1; d < size; ++d) {
      const int c = rank_at(p.g, home, d);
      if (c == rank) p.send_base[home] = base;
      if (home == rank) p.staging_base[d] = base;
      base += tokens[home * ep + c / tp];
    }
  }
  if (thread == 0) {
    int sends = 0, blocks = 0, most = 0;
#pragma unroll 1
    for (int s = 0; s < size; ++s) most = max(most, p.num_tokens[s]);
    const int block_tokens = p.block_tokens[0] = tokens_per_block(p.g, most);
    const Divisor by_block(block_tokens);
#pragma unroll 1
    for (int home = 0; home < size; ++home) {
      p.send_offsets[home] = sends;
      if (home == rank) continue;
      const int count = tokens[home * ep + rank / tp];
      sends += count;
      blocks += by_block.quotient(count + block_tokens - 1);
    }
    p.send_offsets[size] = sends;
    p.num_blocks[0] = blocks;
  }
  int start = 0;
#pragma unroll 1
  for (int first = 0; first < p.g.num_experts; first += kTokenTile) {
    const int e = first + thread;
    const int count = e < p.g.num_experts ? p.counts[rank * p.g.num_experts + e] : 0;
    int total;
    const int before = team.scan(count, &total);
    if (e < p.g.num_experts) p.list_start[e] = start + before;
    start += total;
  }
}

// Columns of token_tile_counts that a team sums at once: with few token tiles a thread sums one,
// otherwise a warp.
constexpr int kMaxSerialTiles = 4;
__device__ inline int columns_at_once(const PlanParams& p) {
  return num_token_tiles(p) <= kMaxSerialTiles ? kTokenTile : kWarps;
}
// Items of sum_token_tiles.
__device__ inline int num_token_tile_sums(const PlanParams& p) {
  const int columns = p.g.num_experts + p.g.size * p.g.local_experts;
  return (columns + columns_at_once(p) - 1) / columns_at_once(p);
}

// Step 2, a team per columns_at_once(). Prefix sums over token tiles of token_tile_counts, in
// place. Columns: all experts for this rank as source, then this rank's experts for all other
// sources.
__device__ inline void sum_token_tiles(const PlanParams& p, const PlanTeam& team, int item) {
  const int experts = p.g.num_experts, token_tiles = num_token_tiles(p), lane = team.thread % 32;
  const bool serial = token_tiles <= kMaxSerialTiles;
  const int column = item * columns_at_once(p) + (serial ? team.thread : team.thread / 32);
  int source = p.g.rank, expert = column;
  if (column >= experts) {
    source = (column - experts) / p.g.local_experts;
    expert = p.g.rank / p.g.tp * p.g.local_experts + (column - experts) % p.g.local_experts;
    if (source == p.g.rank || source >= p.g.size) return;
  }
  int* counts =
      p.token_tile_counts + static_cast<long long>(source) * token_tiles * experts + expert;
  int before = 0;
  if (serial) {
    int values[kMaxSerialTiles];  // all loads before the stores
#pragma unroll
    for (int i = 0; i < kMaxSerialTiles; ++i) {
      values[i] = i < token_tiles ? counts[static_cast<long long>(i) * experts] : 0;
    }
#pragma unroll
    for (int i = 0; i < kMaxSerialTiles; ++i) {
      if (i < token_tiles) counts[static_cast<long long>(i) * experts] = before;
      before += values[i];
    }
    return;
  }
#pragma unroll 1
  for (int first = 0; first < token_tiles; first += 32) {
    const int token_tile = first + lane;
    const int count =
        token_tile < token_tiles ? counts[static_cast<long long>(token_tile) * experts] : 0;
    int sum = count;
#pragma unroll 1
    for (int step = 1; step < 32; step *= 2) {
      const int left = __shfl_up_sync(~0u, sum, step);
      if (lane >= step) sum += left;
    }
    if (token_tile < token_tiles)
      counts[static_cast<long long>(token_tile) * experts] = before + sum - count;
    before += __shfl_sync(~0u, sum, 31);
  }
}

}  // namespace cometrt
