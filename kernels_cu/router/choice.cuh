// The choice of one token's experts by a warp: groups first, then the K largest.
#pragma once

#include "router/scores.cuh"

namespace cometrt {

__device__ inline double bias_of(const RouterParams& p, int expert) {
  if (p.bias == nullptr) return 0.0;
  // The usual type first: a switch in a loop is an indirect branch.
  if (p.bias_type == kFloat32) return static_cast<const float*>(p.bias)[expert];
  return load_element(p.bias, p.bias_type, expert);
}

// to_choice for one kind of router.
template <int kKind>
__device__ inline bool to_scores(const RouterParams& p, const Normalizer& normalizer, double* row) {
  bool valid = true;
#pragma unroll 2
  for (int expert = lane_index(); expert < p.num_experts; expert += 32) {
    const double logit = row[expert], bias = bias_of(p, expert);
    valid = valid && fabs(bias) < CUDART_INF;  // false for NaN
    const double choice = score_of(kKind, normalizer, logit) + bias;
    row[expert] = logit == -CUDART_INF ? -CUDART_INF : choice;
  }
  return __all_sync(~0u, valid);
}

// Replaces a row of logits by score + bias, -infinity for masked experts. Returns false, on all
// lanes, if a bias is not finite. Needed only with a bias or with sums of scores. Otherwise the
// logits decide, which have the same order as the scores.
__device__ inline bool to_choice(const RouterParams& p, const Normalizer& normalizer, double* row) {
  if (p.kind == kSoftmax) return to_scores<kSoftmax>(p, normalizer, row);
  if (p.kind == kSigmoid) return to_scores<kSigmoid>(p, normalizer, row);
  return to_scores<kSqrtSoftplus>(p, normalizer, row);
}

// Sets the choice to -infinity outside the topk_groups best groups. At most 32 groups; each is
// reduced by a subgroup of lanes, whose size is a power of two. Of equal groups the lower wins.
__device__ inline void limit_to_groups(const RouterParams& p, double* choice) {
  const int size = p.num_experts / p.num_groups;
  const int lanes = 32 >> (32 - __clz(p.num_groups - 1));
  const int group = lane_index() / lanes;
  const int first = group * size + lane_index() % lanes;
  const int end = group < p.num_groups ? (group + 1) * size : 0;
  double best = -CUDART_INF, second = -CUDART_INF;
  for (int expert = first; expert < end; expert += lanes) {
    const double value = choice[expert];
    second = fmax(second, fmin(best, value));
    best = fmax(best, value);
  }
  for (int step = lanes / 2; step > 0; step /= 2) {
    const double other = __shfl_xor_sync(~0u, best, step);
    second = fmax(fmin(best, other), fmax(second, __shfl_xor_sync(~0u, second, step)));
    best = fmax(best, other);
  }
  const double score = p.sum_of_two && second > -CUDART_INF ? best + second : best;
  int num_better = 0;
  for (int i = 0; i < p.num_groups; ++i) {
    const double other = __shfl_sync(~0u, score, i * lanes);
    num_better += other > score || (other == score && i < group);
  }
  if (num_better < p.topk_groups) return;
  for (int expert = first; expert < end; expert += lanes) choice[expert] = -CUDART_INF;
}

// Maps values to integers of the same order. -0 and 0 get the same integer; -infinity gets 0.
__device__ inline u64 key_of(double value) {
  if (value == -CUDART_INF) return 0;
  const u64 bits = __double_as_longlong(value == 0 ? 0.0 : value), sign = 1ull << 63;
  return bits & sign ? ~bits : bits | sign;
}

// Lane k gets the expert with the k-th largest choice, -1 where none is left. Of equal ones the
// lower id wins.
__device__ inline int largest(const RouterParams& p, const double* choice) {
  constexpr int kNone = 0x7fffffff;
  const int lane = lane_index();
  u64 keys[kPerLane], best = 0;  // best, best_id: of this lane's experts not yet chosen
  int best_id = kNone, chosen = -1;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    keys[i] = key_of(choice[i * 32 + lane]);
    if (keys[i] > best) best = keys[i], best_id = i * 32 + lane;
  }
#pragma unroll 1
  for (int k = 0; k < p.topk; ++k) {
    const u32 upper = best >> 32, lower = best;
    const u32 max_upper = __reduce_max_sync(~0u, upper);
    const u32 max_lower = __reduce_max_sync(~0u, upper == max_upper ? lower : 0);
    if ((max_upper | max_lower) == 0) break;
    const bool wins = upper == max_upper && lower == max_lower;
    const int id = __reduce_min_sync(~0u, wins ? best_id : kNone);
    if (lane == k) chosen = id;
    if (best_id != id) continue;
    best = 0, best_id = kNone;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (i * 32 + lane == id) keys[i] = 0;
      if (keys[i] > best) best = keys[i], best_id = i * 32 + lane;
    }
  }
  return chosen;
}

}  // namespace cometrt
