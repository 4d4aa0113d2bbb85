// Helpers of the planner's steps: token tiles, loads of a token's pairs, bit masks of chosen
// experts.
#pragma once

#include "common/divisor.cuh"
#include "common/team.cuh"
#include "plan/plan.cuh"

namespace cometrt {

constexpr int kTokenTile = COMETRT_TOKEN_TILE;  // tokens of a work item: one a thread of the team
constexpr int kWarps = kTokenTile / 32;
constexpr u32 kNoOrderIdx = 0xffffffffu;          // first_order_idx of a token that no tile needs
constexpr int kPairsAtOnce = 8, kRowsAtOnce = 4;  // loads in flight per thread

// The threads that do a work item of the planner together.
using PlanTeam = Team<kTokenTile>;

__device__ inline int num_token_tiles(const PlanParams& p) {
  return (p.g.max_tokens + kTokenTile - 1) / kTokenTile;
}

// values[index]. The array stays in registers, though the index is no constant.
template <typename T, int kCount>
__device__ inline T select(const T (&values)[kCount], int index) {
  T found = values[0];
#pragma unroll
  for (int i = 1; i < kCount; ++i) found = index == i ? values[i] : found;
  return found;
}

// Loads a token's pairs [k, k + kPairsAtOnce), -1 beyond topk. Vector loads if rows are aligned.
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

// `members` [experts, 4], in shared memory: bit mask of the tile's tokens that chose an expert.
// Sets the bit of the team's thread and returns the word before.
__device__ inline u32 choose(u32* members, int expert, int thread) {
  return atomicOr(&members[4 * expert + thread / 32], 1u << (thread % 32));
}
// Tokens before this thread's that chose the expert.
__device__ inline int chosen_before(const u32* members, int expert, int thread) {
  const int warp = thread / 32;
  int count = __popc(members[4 * expert + warp] & ((1u << (thread % 32)) - 1));
#pragma unroll
  for (int w = 0; w < kWarps - 1; ++w) count += w < warp ? __popc(members[4 * expert + w]) : 0;
  return count;
}

// Index into rank_rows: rank c's first row of a local expert from the source at ring distance d. d
// = size: the end of the expert's rows.
__device__ inline long long rank_rows_idx(const PlanParams& p, int c, int d, int expert) {
  return (static_cast<long long>(c) * (p.g.size + 1) + d) * p.g.local_experts + expert;
}

}  // namespace cometrt
