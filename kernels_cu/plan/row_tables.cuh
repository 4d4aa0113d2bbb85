// Steps 3 to 5 of the planner: the row of each pair, and the order of pulls, sends and staging
// rows.
#pragma once

#include "plan/token_tile.cuh"

namespace cometrt {

// Step 3, a team per (token tile, source), whose threads share the tile's pairs. Writes
//   - this rank's rows: pair_row, row_pair, row_weight;
//   - for own tokens, pair_list;
//   - first_order_idx: the first tile that needs a token, on this rank for all sources, and on
//     every rank for own tokens;
//   - run_counts: how many tokens need each tile first.
// kAtOnce: pairs of a thread whose loads overlap.
template <int kAtOnce>
__device__ inline void place_rows(const PlanParams& p, const PlanTeam& team, int token_tile_idx,
                                  int source, u32* members) {
  const int experts = p.g.local_experts, num_experts = p.g.num_experts;
  const int tp = p.g.tp, size = p.g.size, rank = p.g.rank, thread = team.thread;
  const bool own = source == rank;
  // Of another source, only pairs of this rank's experts matter.
  const int first_local = rank / tp * experts;
  const int begin = own ? 0 : first_local, end = own ? num_experts : first_local + experts;
  const int first_shard = own ? 0 : rank % tp, end_shard = own ? tp : first_shard + 1;
  // For each expert's first pair in the token tile: its index in pair_list, its row on each shard.
  int* starts = reinterpret_cast<int*>(members + 4 * num_experts);  // [num_experts]
  int* rows = starts + num_experts;                                 // [tp, num_experts]
  u32* firsts = reinterpret_cast<u32*>(rows + tp * num_experts);    // [size, kTokenTile]
  const int* counts =
      p.token_tile_counts +
      (static_cast<long long>(source) * num_token_tiles(p) + token_tile_idx) * num_experts;
  const int first_token = token_tile_idx * kTokenTile;
  const int tokens = min(kTokenTile, p.num_tokens[source] - first_token), pairs = tokens * p.g.topk;
  const long long first_global_token =
      static_cast<long long>(source) * p.g.max_tokens + first_token;
  const long long first_pair = first_global_token * p.g.topk;
  const Divisor by_experts(experts), by_topk(p.g.topk), by_block_m(p.g.block_m);
  int ids[kAtOnce];  // of this thread's pairs first + i * kTokenTile; -1 if a pair does not matter
  const auto load_ids = [&](int first) {
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int pair = first + i * kTokenTile;
      const int id = pair < pairs ? p.ids[first_pair + pair] : -1;
      ids[i] = id >= begin && id < end ? id : -1;
    }
  };
  load_ids(thread);  // early, and once where a thread has no more pairs
#pragma unroll 1
  for (int e = begin + thread; e < end; e += kTokenTile) {
    reinterpret_cast<uint4*>(members)[e] = make_uint4(0, 0, 0, 0);
    starts[e] = p.list_start[e] + counts[e];
#pragma unroll 1
    for (int shard = first_shard; shard < end_shard; ++shard) {
      const int c = by_experts.quotient(e) * tp + shard, d = ring_distance(p.g, c, source);
      rows[shard * num_experts + e] =
          p.rank_rows[rank_rows_idx(p, c, d, by_experts.remainder(e))] + counts[e];
    }
  }
  firsts[rank * kTokenTile + thread] = kNoOrderIdx;
#pragma unroll 1
  for (int c = 0; c < size && own; ++c) firsts[c * kTokenTile + thread] = kNoOrderIdx;
  team.sync();
#pragma unroll 1
  for (int first = thread; first < pairs; first += kAtOnce * kTokenTile) {
    if (first != thread) load_ids(first);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (ids[i] >= 0) choose(members, ids[i], by_topk.quotient(first + i * kTokenTile));
    }
  }
  team.sync();
#pragma unroll 1
  for (int first = thread; first < pairs; first += kAtOnce * kTokenTile) {
    if (pairs > kAtOnce * kTokenTile) load_ids(first);
    int indices[kAtOnce];
    float weights[kAtOnce];  // all loads before the stores
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int pair = first + i * kTokenTile;
      weights[i] = pair < pairs ? p.weights[first_pair + pair] : 0;
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (ids[i] < 0) continue;
      indices[i] = chosen_before(members, ids[i], by_topk.quotient(first + i * kTokenTile));
    }
#pragma unroll 1
    for (int shard = first_shard; shard < end_shard; ++shard) {
      u32 order_indices[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (ids[i] < 0) continue;
        const int c = by_experts.quotient(ids[i]) * tp + shard;
        const int tile = by_block_m.quotient(rows[shard * num_experts + ids[i]] + indices[i]);
        order_indices[i] = p.rank_tile_order_idx[static_cast<long long>(c) * p.g.max_tiles + tile];
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (ids[i] < 0) continue;
        const int c = by_experts.quotient(ids[i]) * tp + shard;
        const int token = by_topk.quotient(first + i * kTokenTile);
        atomicMin(&firsts[c * kTokenTile + token], order_indices[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int id = ids[i], pair = first + i * kTokenTile;
      if (id < 0) continue;
      if (own) p.pair_list[starts[id] + indices[i]] = first_token + by_topk.quotient(pair);
      if (id < first_local || id >= first_local + experts) continue;
      const int row = rows[rank % tp * num_experts + id] + indices[i];
      p.pair_row[first_pair + pair] = row;
      p.row_pair[row] = static_cast<int>(first_pair + pair);
      p.row_weight[row] = weights[i];
    }
  }
  team.sync();
  if (thread >= tokens) return;
  const auto add_first_use = [&](int j, long long at, int c) {
    const u32 first = firsts[c * kTokenTile + thread];
    p.first_order_idx[at] = first;
    if (first != kNoOrderIdx) atomicAdd(&p.run_counts[j * p.g.max_tiles + first], 1);
  };
  add_first_use(source, first_global_token + thread, rank);
#pragma unroll 1
  for (int c = 0; c < size && own; ++c) {
    const long long column = static_cast<long long>(size + c) * p.g.max_tokens;
    add_first_use(size + c, column + first_token + thread, c);
  }
}

// Items of sum_runs: the pulls; then a column of sends and one of staging rows for each other rank.
__device__ inline int num_run_sums(const PlanParams& p) { return 2 * p.g.size - 1; }

// Step 4, a team per item. Prefix sums of run_counts along an order. Pulls of all sources (j = -1)
// are in dispatch order; sends and staging rows in the order of gemm_combine, which is backwards.
__device__ inline void sum_runs(const PlanParams& p, const PlanTeam& team, int item) {
  const int size = p.g.size, max_tiles = p.g.max_tiles, other = (item + 1) / 2;
  const int j = item == 0 ? -1 : item % 2 * size + (p.g.rank + other) % size;
  const int share = (max_tiles + kTokenTile - 1) / kTokenTile;
  const int begin = team.thread * share, end = min(begin + share, max_tiles);
  const auto order_idx = [&](int i) { return j < 0 ? i : max_tiles - 1 - i; };
  const auto count = [&](int i) {
    if (j >= 0) return p.run_counts[j * max_tiles + order_idx(i)];
    int sum = 0;
#pragma unroll 8
    for (int s = 0; s < size; ++s) sum += p.run_counts[s * max_tiles + i];
    return sum;
  };
  int mine = 0, total;
#pragma unroll 1
  for (int i = begin; i < end; ++i) mine += count(i);
  int sum = team.scan(mine, &total);
  int* out = j < 0 ? p.pull_offsets : p.run_starts + j * max_tiles;
#pragma unroll 1
  for (int i = begin; i < end; ++i) {
    const int here = count(i);
    out[order_idx(i)] = sum;
    sum += here;
  }
  if (team.thread == 0) {
    if (j < 0) {
      p.pull_offsets[max_tiles] = total;
    } else {
      p.column_tokens[j] = total;
    }
  }
}

// Step 5. Index in push_blocks of a block whose last tile has that order index. Blocks are sorted
// by (when gemm_combine finishes them, ring distance of the home, block). So the index is the
// number of blocks that are complete before, those of nearer homes with the same order index
// included.
__device__ inline int push_idx(const PlanParams& p, int home, int block, int order_idx,
                               const Divisor& by_block) {
  int index = block;
  const int mine = ring_distance(p.g, p.g.rank, home);
#pragma unroll 4
  for (int d = 1; d < p.g.size; ++d) {
    const int other = rank_at(p.g, p.g.rank, d), at = other * p.g.max_tiles + order_idx;
    const int tokens = p.run_starts[at] + (d < mine ? p.run_counts[at] : 0);
    const bool all = tokens == p.column_tokens[other];  // a home's last block may be partial
    const int whole = by_block.quotient(tokens + (all ? p.block_tokens[0] - 1 : 0));
    index += d == mine ? 0 : whole;
  }
  return index;
}

// Step 5, a warp per order index. Writes pull_tokens, send_tokens and push_blocks for the tokens
// that need this tile first. In a tile they are sorted by (ring distance, token). kAtOnce: rows of
// a lane whose loads overlap.
template <int kAtOnce>
__device__ inline void place_pulls(const PlanParams& p, int order_idx) {
  const int lane = threadIdx.x % 32, max_tiles = p.g.max_tiles, block_tokens = p.block_tokens[0];
  if (order_idx >= p.rank_num_tiles[p.g.rank]) return;
  const Divisor by_topk(p.g.topk), by_max_tokens(p.g.max_tokens), by_block(block_tokens);
  const long long first_row = static_cast<long long>(p.tile_order[order_idx]) * p.g.block_m;
  int pulls = p.pull_offsets[order_idx];
  int last_source = -1, sent = 0;  // source of the last row so far, and its tokens so far
#pragma unroll 1
  for (int first = 0; first < p.g.block_m; first += 32 * kAtOnce) {
    int tokens[kAtOnce];
    bool here[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int row = first + 32 * i + lane;
      const int pair = row < p.g.block_m ? p.row_pair[first_row + row] : -1;
      tokens[i] = pair < 0 ? -1 : by_topk.quotient(pair);
    }
    if (__all_sync(~0u, tokens[0] < 0)) break;  // only padding rows from here
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      here[i] = tokens[i] >= 0 && p.first_order_idx[tokens[i]] == static_cast<u32>(order_idx);
    }
#pragma unroll 1
    for (int i = 0; i < kAtOnce; ++i) {
      const int token = select(tokens, i);
      const bool is_here = select(here, i);
      const u32 all = __ballot_sync(~0u, is_here), left = all & ((1u << lane) - 1);
      if (all == 0) continue;
      const int s = is_here ? by_max_tokens.quotient(token) : -1;
      const u32 same = __match_any_sync(~0u, s);
      const int index = __popc(same & left) + (s == last_source ? sent : 0);
      if (is_here) {
        p.pull_tokens[pulls + __popc(left)] = token;
        if (s != p.g.rank) {
          const int at = p.run_starts[s * max_tiles + order_idx] + index;
          p.send_tokens[p.send_offsets[s] + at] = token;
          const int block = by_block.quotient(at);
          if (at + 1 == (block + 1) * block_tokens || at + 1 == p.column_tokens[s]) {
            const int item = s * p.g.blocks_per_home + block;
            p.block_order_idx[item] = order_idx;
            p.push_blocks[push_idx(p, s, block, order_idx, by_block)] = item;
          }
        }
      }
      pulls += __popc(all);
      const int last = 31 - __clz(all);
      last_source = __shfl_sync(~0u, s, last);
      sent = __shfl_sync(~0u, index, last) + 1;
    }
  }
}

// Step 5, a warp per rank c and kRuns <= 32 order indices. Writes staging_row for this home's
// tokens in rank c's runs. Each lane looks up one run; then all lanes walk each run that is not
// empty. kAtOnce: as for place_pulls.
template <int kRuns, int kAtOnce>
__device__ inline void place_staging_rows(const PlanParams& p, int c, int first_order_idx) {
  const int lane = threadIdx.x % 32, max_tiles = p.g.max_tiles, mine = first_order_idx + lane;
  const int experts = p.g.local_experts, back = ring_distance(p.g, p.g.rank, c);
  if (back == 0) return;  // the home's own sum is not staged
  int begin_of = 0, end_of = 0,
      first_row = 0;  // the lane's run in pair_list; its first staging row
  if (lane < kRuns && mine < p.rank_num_tiles[c]) {
    const int column = (p.g.size + c) * max_tiles + mine;
    const int packed = p.rank_order[static_cast<long long>(c) * max_tiles + mine];
    const int tokens = p.run_counts[column];
    first_row = p.staging_base[back] + p.run_starts[column];
    const int tile = static_cast<u32>(packed) / experts, expert = packed - tile * experts;
    const long long rows = rank_rows_idx(p, c, ring_distance(p.g, c, p.g.rank), expert);
    const int first = p.rank_rows[rows], end = p.rank_rows[rows + experts];
    const int start = p.list_start[c / p.g.tp * experts + expert] - first;
    begin_of = start + max(tile * p.g.block_m, first);
    end_of = tokens == 0 ? begin_of : start + min((tile + 1) * p.g.block_m, end);
  }
  const u32* needed = p.first_order_idx + static_cast<long long>(p.g.size + c) * p.g.max_tokens;
#pragma unroll 1
  for (u32 runs = __ballot_sync(~0u, begin_of < end_of); runs; runs &= runs - 1) {
    const int which = __ffs(runs) - 1, order_idx = first_order_idx + which;
    const int begin = __shfl_sync(~0u, begin_of, which), end = __shfl_sync(~0u, end_of, which);
    int next_row = __shfl_sync(~0u, first_row, which);
#pragma unroll 1
    for (int first = begin; first < end; first += 32 * kAtOnce) {
      int tokens[kAtOnce];
      bool here[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int at = first + 32 * i + lane;
        tokens[i] = at < end ? p.pair_list[at] : -1;
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        here[i] = tokens[i] >= 0 && needed[tokens[i]] == static_cast<u32>(order_idx);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const u32 all = __ballot_sync(~0u, here[i]);
        const int row = next_row + __popc(all & ((1u << lane) - 1));
        if (here[i]) p.staging_row[static_cast<long long>(tokens[i]) * p.g.size + back] = row;
        next_row += __popc(all);
      }
    }
  }
}

}  // namespace cometrt
