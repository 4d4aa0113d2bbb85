// The planner's first step, and what it takes from other ranks.
#pragma once

#include "comm/pacing.cuh"
#include "exchange/agree.cuh"
#include "plan/items.cuh"

namespace cometrt {

// 1. Every table is -1, weights 0, and what later steps count up is 0: a slice of `count`.
__device__ inline void clear_tables(const PlanParams& p, int slice, int count) {
  const long long first = static_cast<long long>(slice) * kChunk + threadIdx.x;
  const long long step = static_cast<long long>(count) * kChunk;
  int4* tables = reinterpret_cast<int4*>(p.tables);
  for (long long i = first; i < p.num_words / 4; i += step) tables[i] = make_int4(-1, -1, -1, -1);
  for (long long i = first; i < p.g.capacity; i += step) p.row_weight[i] = 0;
  for (long long i = first; i < 2 * p.g.size * p.g.max_tiles; i += step) p.segment_counts[i] = 0;
  for (long long i = first; i < p.g.size * p.g.blocks_per_home; i += step) p.block_position[i] = -1;
}

// The tokens of a source as this block knows them (-1: the world has stopped), its ids, and when
// those of a chunk will have crossed, which the first thread knows.
struct Routing {
  int tokens;
  const int* ids;
  u64 crossed_ns;
};

// Waits for the source and sends for the ids of a chunk of its tokens. Acquires source_ready.
__device__ inline Routing find_routing(const Call& c, const Pace& pace, const PlanParams& p,
                                       int chunk_idx, int source) {
  __shared__ int shared_tokens;
  u64 crossed_ns = 0;
  if (threadIdx.x == 0) {
    const int tokens = shared_tokens = wait_source(c, source);
    if (chunk_idx == 0) p.num_tokens[source] = tokens;
    const int here = max(0, min(kChunk, tokens - chunk_idx * kChunk));
    if (source != c.world.rank) crossed_ns = reserve_link(pace, 4ull * here * p.g.topk);
  }
  __syncthreads();
  return {shared_tokens, c.routing<int>(source, c.world.epoch(), c.ids_at), crossed_ns};
}

__device__ inline void tell_wrong(const PlanParams& p, long long pair) {
  atomicMax(&p.progress->wrong_pair, ~static_cast<u64>(pair));  // the first one stands
}

// 1. Takes a chunk's ids into this rank's table and checks them; counts pairs by (source, chunk,
// expert) and (source, expert), and tokens by (source, group). `meanwhile()` runs while the ids are
// on their way. Blocks whose waits ended may know less of a source than others do: no tables are
// made of that. A block a (chunk, source).
template <typename Meanwhile>
__device__ inline void count_pairs(const PlanParams& p, int chunk_idx, int source,
                                   const Routing& routing, u32* members, Meanwhile meanwhile) {
  const int thread = threadIdx.x, lane = thread % 32, topk = p.g.topk;
  for (int i = thread; i < 4 * p.g.num_experts; i += kChunk) members[i] = 0;
  const int token = chunk_idx * kChunk + thread;
  const bool used = token < routing.tokens;
  const int* from = routing.ids + static_cast<long long>(token) * topk;
  const long long first_pair = (static_cast<long long>(source) * p.g.max_tokens + token) * topk;
  u64 groups = 0;
  for (int k = 0; k < topk; k += kPairsAtOnce) {
    int ids[kPairsAtOnce];
    if (used) load_pairs(from, k, topk, ids);
    if (k == 0) {
      meanwhile();
      if (thread == 0) wait_crossed(routing.crossed_ns);
      __syncthreads();
    }
    if (used) store_pairs(p.ids + first_pair, k, topk, ids);
#pragma unroll
    for (int i = 0; i < kPairsAtOnce; ++i) {
      if (!used || k + i >= topk) continue;
      bool wrong = ids[i] < -1 || ids[i] >= p.g.num_experts;
      if (ids[i] >= 0 && !wrong) {
        wrong = choose(members, ids[i]) >> lane & 1;  // chosen before
        groups |= 1ull << (ids[i] / p.g.local_experts);
      }
      if (wrong) tell_wrong(p, first_pair + k + i);
    }
  }
  for (int first = 0; first < p.g.ep; first += 32) {  // a lane sums a group
    int count = 0;
    for (int group = first; group < min(first + 32, p.g.ep); ++group) {
      const u32 with = __ballot_sync(~0u, groups >> group & 1);
      if (group % 32 == lane) count = __popc(with);
    }
    if (count) atomicAdd(&p.token_counts[source * p.g.ep + first + lane], count);
  }
  if (routing.tokens < 0 && thread == 0) p.progress->largest_need = ~0ull;
  __syncthreads();
  int* counts = p.chunk_counts +
                (static_cast<long long>(source) * num_chunks(p) + chunk_idx) * p.g.num_experts;
  for (int e = thread; e < p.g.num_experts; e += kChunk) {
    const uint4 mask = reinterpret_cast<const uint4*>(members)[e];
    const int count = __popc(mask.x) + __popc(mask.y) + __popc(mask.z) + __popc(mask.w);
    counts[e] = count;
    if (count) atomicAdd(&p.counts[source * p.g.num_experts + e], count);
  }
}

// 2. A chunk's weights, from the source's table into this rank's, checked. The first thread returns
// when they will have crossed. A block a (chunk, source).
__device__ inline u64 take_weights(const PlanParams& p, int chunk_idx, int source,
                                   const float* from, const Pace* pace) {
  const int tokens = p.num_tokens[source], topk = p.g.topk;
  const int begin = chunk_idx * kChunk * topk, end = min(tokens, (chunk_idx + 1) * kChunk) * topk;
  const long long to = static_cast<long long>(source) * p.g.max_tokens * topk;
  u64 crossed_ns = 0;
  if (pace != nullptr && threadIdx.x == 0 && begin < end && source != p.g.rank) {
    crossed_ns = reserve_link(*pace, 4ull * (end - begin));
  }
  for (int first = begin + threadIdx.x; first < end; first += kPairsAtOnce * kChunk) {
    float weights[kPairsAtOnce];
#pragma unroll
    for (int i = 0; i < kPairsAtOnce; ++i) {
      weights[i] = first + i * kChunk < end ? from[first + i * kChunk] : 0;
    }
#pragma unroll
    for (int i = 0; i < kPairsAtOnce; ++i) {
      const int pair = first + i * kChunk;
      if (pair >= end) continue;
      p.weights[to + pair] = weights[i];
      if (!isfinite(weights[i])) tell_wrong(p, to + pair);
    }
  }
  return crossed_ns;
}

}  // namespace cometrt
