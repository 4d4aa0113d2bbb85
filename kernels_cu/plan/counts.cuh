// Step 1 of the planner: clear tables, and count pairs while copying all ranks' routing. It reads
// peers' memory after acquiring source_ready, in this block or in one that the end of a step
// ordered before it.
#pragma once

#include "plan/token_tile.cuh"
#include "protocol/agree.cuh"
#include "protocol/emulated_link.cuh"

namespace cometrt {

// Step 1, by thread `first` of `step`. Clears tables to -1, row_weight and counters of later steps
// to 0.
__device__ inline void clear_tables(const PlanParams& p, long long first, long long step) {
  int4* tables = reinterpret_cast<int4*>(p.tables);
#pragma unroll 1
  for (long long i = first; i < p.num_words / 4; i += step) tables[i] = make_int4(-1, -1, -1, -1);
#pragma unroll 1
  for (long long i = first; i < p.g.capacity; i += step) p.row_weight[i] = 0;
#pragma unroll 1
  for (long long i = first; i < 2 * p.g.size * p.g.max_tiles; i += step) p.run_counts[i] = 0;
#pragma unroll 1
  for (long long i = first; i < p.g.size * p.g.blocks_per_home; i += step)
    p.block_order_idx[i] = -1;
}

// What count_pairs() reads of a source.
struct Routing {
  int tokens;          // of the source; -1: the world has stopped
  const int* ids;      // [tokens, topk], in the source's memory
  u64 transferred_ns;  // end of the token tile's link transfer; in thread 0
};

// By all threads: waits for the source and begins the link transfer of a token tile's ids. Acquires
// source_ready in thread 0; the block's barrier passes it on.
__device__ inline Routing find_routing(const ExchangeParams& params, const EmulatedLink& link,
                                       const PlanParams& p, int token_tile_idx, int source) {
  __shared__ int shared_tokens;
  u64 transferred_ns = 0;
  if (threadIdx.x == 0) {
    const int tokens = shared_tokens = wait_source(params, params.world.epoch(), source);
    if (token_tile_idx == 0) p.num_tokens[source] = tokens;
    const int here = max(0, min(kTokenTile, tokens - token_tile_idx * kTokenTile));
    if (source != params.world.rank) transferred_ns = begin_transfer(link, 4ull * here * p.g.topk);
  }
  __syncthreads();
  return {shared_tokens, params.routing<int>(source, params.world.epoch(), params.ids_offset),
          transferred_ns};
}

__device__ inline void report_wrong_pair(const PlanParams& p, long long pair) {
  atomicMax(&p.progress->wrong_pair, ~static_cast<u64>(pair));  // the lowest pair wins
}

// Step 1, a team per (token tile, source). Copies the tile's ids into this rank's table and checks
// them. Counts pairs by (source, token tile, expert) and (source, expert), and tokens by (source,
// EP group). `meanwhile()` runs while the ids arrive. If the world has stopped, blocks may see
// different numbers of tokens; largest_need then keeps later steps from using them.
template <typename Meanwhile>
__device__ inline void count_pairs(const PlanParams& p, const PlanTeam& team, int token_tile_idx,
                                   int source, const Routing& routing, u32* members,
                                   Meanwhile meanwhile) {
  const int thread = team.thread, lane = thread % 32, topk = p.g.topk;
#pragma unroll 1
  for (int i = thread; i < 4 * p.g.num_experts; i += kTokenTile) members[i] = 0;
  const int token = token_tile_idx * kTokenTile + thread;
  const bool used = token < routing.tokens;
  const int* from = routing.ids + static_cast<long long>(token) * topk;
  const long long first_pair = (static_cast<long long>(source) * p.g.max_tokens + token) * topk;
  const Divisor local_experts(p.g.local_experts);
  u64 groups = 0;
#pragma unroll 1
  for (int k = 0; k < topk; k += kPairsAtOnce) {
    int ids[kPairsAtOnce];
    if (used) load_pairs(from, k, topk, ids);
    if (k == 0) {
      meanwhile();
      if (thread == 0) wait_transferred(routing.transferred_ns);
      team.sync();
    }
    if (used) store_pairs(p.ids + first_pair, k, topk, ids);
    u32 wrong = 0;  // a bit a pair
#pragma unroll
    for (int i = 0; i < kPairsAtOnce; ++i) {
      const int id = used ? ids[i] : -1;  // -1 beyond topk too
      if (id >= 0 && id < p.g.num_experts) {
        const u32 repeated = choose(members, id, thread) >> lane & 1;  // within the token
        wrong |= repeated << i;
        groups |= 1ull << local_experts.quotient(id);
      } else {
        wrong |= (id != -1) << i;
      }
    }
    if (wrong != 0) report_wrong_pair(p, first_pair + k + __ffs(wrong) - 1);
  }
#pragma unroll 1
  for (int first = 0; first < p.g.ep; first += 32) {  // one EP group a lane
    int count = 0;
#pragma unroll 1
    for (int group = first; group < min(first + 32, p.g.ep); ++group) {
      const u32 with = __ballot_sync(~0u, groups >> group & 1);
      if (group % 32 == lane) count = __popc(with);
    }
    if (count) atomicAdd(&p.token_counts[source * p.g.ep + first + lane], count);
  }
  if (routing.tokens < 0 && thread == 0) p.progress->largest_need = ~0ull;
  team.sync();
  int* counts =
      p.token_tile_counts +
      (static_cast<long long>(source) * num_token_tiles(p) + token_tile_idx) * p.g.num_experts;
#pragma unroll 1
  for (int e = thread; e < p.g.num_experts; e += kTokenTile) {
    const uint4 mask = reinterpret_cast<const uint4*>(members)[e];
    const int count = __popc(mask.x) + __popc(mask.y) + __popc(mask.z) + __popc(mask.w);
    counts[e] = count;
    if (count) atomicAdd(&p.counts[source * p.g.num_experts + e], count);
  }
}

// Step 2, a team per (token tile, source). Copies the tile's router weights from the source's table
// into this rank's and checks them. Thread 0 returns the end of their link transfer.
__device__ inline u64 copy_weights(const PlanParams& p, const PlanTeam& team, int token_tile_idx,
                                   int source, const float* from, const EmulatedLink* link) {
  const int tokens = p.num_tokens[source], topk = p.g.topk;
  const int begin = token_tile_idx * kTokenTile * topk,
            end = min(tokens, (token_tile_idx + 1) * kTokenTile) * topk;
  const long long to = static_cast<long long>(source) * p.g.max_tokens * topk;
  u64 transferred_ns = 0;
  if (link != nullptr && team.thread == 0 && begin < end && source != p.g.rank) {
    transferred_ns = begin_transfer(*link, 4ull * (end - begin));
  }
#pragma unroll 1
  for (int first = begin + team.thread; first < end; first += kPairsAtOnce * kTokenTile) {
    float weights[kPairsAtOnce];
#pragma unroll
    for (int i = 0; i < kPairsAtOnce; ++i) {
      weights[i] = first + i * kTokenTile < end ? from[first + i * kTokenTile] : 0;
    }
#pragma unroll
    for (int i = 0; i < kPairsAtOnce; ++i) {
      const int pair = first + i * kTokenTile;
      if (pair >= end) continue;
      p.weights[to + pair] = weights[i];
      if (!isfinite(weights[i])) report_wrong_pair(p, to + pair);
    }
  }
  return transferred_ns;
}

}  // namespace cometrt
