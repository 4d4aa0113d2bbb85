// What the planner's steps have in common: token tiles, a token's pairs, where tables lie.
#pragma once

#include "plan/plan.cuh"

namespace cometrt {

constexpr int kTokenTile =
    COMETRT_TOKEN_TILE;  // tokens that a block counts or places: one a thread
constexpr int kWarps = kTokenTile / 32;
constexpr u32 kNever = 0xffffffffu;
constexpr int kPairsAtOnce = 8, kRowsAtOnce = 4;

__device__ inline int num_token_tiles(const PlanParams& p) {
  return (p.g.max_tokens + kTokenTile - 1) / kTokenTile;
}

// Words of a token's pairs from k on, -1 beyond the last; as vectors where these are aligned.
__device__ inline void load_pairs(const int* words, int k, int topk, int (&out)[kPairsAtOnce]) {
#pragma unroll
  for (int i = 0; i < kPairsAtOnce; i += 4) {
    if (topk % 4 == 0) {
      int4 four = make_int4(-1, -1, -1, -1);
      if (k + i < topk) four = *reinterpret_cast<const int4*>(words + k + i);
      out[i] = four.x, out[i + 1] = four.y, out[i + 2] = four.z, out[i + 3] = four.w;
    } else {
#pragma unroll
      for (int j = i; j < i + 4; ++j) out[j] = k + j < topk ? words[k + j] : -1;
    }
  }
}

__device__ inline void store_pairs(int* words, int k, int topk, const int (&from)[kPairsAtOnce]) {
#pragma unroll
  for (int i = 0; i < kPairsAtOnce; i += 4) {
    if (topk % 4 == 0) {
      const int4 four = make_int4(from[i], from[i + 1], from[i + 2], from[i + 3]);
      if (k + i < topk) *reinterpret_cast<int4*>(words + k + i) = four;
    } else {
#pragma unroll
      for (int j = i; j < i + 4; ++j) {
        if (k + j < topk) words[k + j] = from[j];
      }
    }
  }
}

// Which tokens of the tile chose an expert: 4 words an expert, in shared memory.
__device__ inline u32 choose(u32* members, int expert) {  // returns the word as it was
  return atomicOr(&members[4 * expert + threadIdx.x / 32], 1u << (threadIdx.x % 32));
}
__device__ inline int chosen_before(const u32* members, int expert) {
  const int warp = threadIdx.x / 32;
  int count = __popc(members[4 * expert + warp] & ((1u << (threadIdx.x % 32)) - 1));
#pragma unroll
  for (int w = 0; w < kWarps - 1; ++w) count += w < warp ? __popc(members[4 * expert + w]) : 0;
  return count;
}

// Where the tables of rank c have its rows of a local expert from the source at ring distance d;
// d = size: where the expert ends.
__device__ inline long long rank_rows_at(const PlanParams& p, int c, int d, int expert) {
  return (static_cast<long long>(c) * (p.g.size + 1) + d) * p.g.local_experts + expert;
}

}  // namespace cometrt
