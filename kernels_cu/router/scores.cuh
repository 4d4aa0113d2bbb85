// A warp's view of one token: its logits, the experts' scores, and the weights of chosen experts.
// All arithmetic is in float64 and follows cometrt/router/host.py, so both make the same choice.
#pragma once

#include <math_constants.h>

#include "router/elements.cuh"

namespace cometrt {

constexpr int kPerLane = EXPERTS_PER_LANE;  // of the 32 * kPerLane experts that fit
constexpr int kMaxExperts = 32 * kPerLane;
constexpr int kWarps = 4;                            // of a CTA
constexpr int kBlocksPerSm = kPerLane > 16 ? 4 : 8;  // at least: leaves enough registers

// All loads of a lane are in flight together. Entries from num_experts on become -infinity.
template <typename T>
__device__ inline void load_logits(const T* logits, int num_experts, double* row) {
  double values[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int expert = i * 32 + lane_index();
    values[i] = expert < num_experts ? to_double(logits[expert]) : -CUDART_INF;
  }
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) row[i * 32 + lane_index()] = values[i];
}

// The token's logits as row [kMaxExperts] in shared memory, -infinity where an expert is masked.
// False for a token with a NaN or +infinity, on all lanes. Lane l writes entries l, l + 32, ...
__device__ inline bool load_row(const RouterParams& p, int token, double* row) {
  const long long begin = static_cast<long long>(token) * p.num_experts;
  switch (p.logits_type) {
    case kFloat32:
      load_logits(static_cast<const float*>(p.logits) + begin, p.num_experts, row);
      break;
    case kFloat64:
      load_logits(static_cast<const double*>(p.logits) + begin, p.num_experts, row);
      break;
    case kBfloat16:
      load_logits(static_cast<const __nv_bfloat16*>(p.logits) + begin, p.num_experts, row);
      break;
    default:
      load_logits(static_cast<const __half*>(p.logits) + begin, p.num_experts, row);
  }
  bool valid = true;
  const unsigned char* mask = p.mask + static_cast<long long>(token) * p.mask_stride;
#pragma unroll 4
  for (int expert = lane_index(); expert < p.num_experts; expert += 32) {
    valid = valid && row[expert] < CUDART_INF;  // false for NaN
    if (p.mask != nullptr && mask[expert] == 0) row[expert] = -CUDART_INF;
  }
  return __all_sync(~0u, valid);
}

// Softmax over a row: exp(logit - max) / sum. Without an expert that may be chosen, sum is 0.
struct Normalizer {
  double max, sum;

  __device__ double probability(double logit) const { return exp(logit - max) / sum; }
  __device__ double logsumexp() const { return max + log(sum); }
};

__device__ inline Normalizer normalizer_of(int num_experts, const double* row) {
  double max = -CUDART_INF, sum = 0;
  for (int expert = lane_index(); expert < num_experts; expert += 32) max = fmax(max, row[expert]);
  max = warp_max(max);
  if (max == -CUDART_INF) max = 0;
#pragma unroll 2
  for (int expert = lane_index(); expert < num_experts; expert += 32) sum += exp(row[expert] - max);
  return {max, warp_sum(sum)};
}

__device__ inline double sigmoid(double x) {
  const double small = exp(-fabs(x));  // at most 1
  return (x >= 0 ? 1.0 : small) / (1.0 + small);
}

__device__ inline double softplus(double x) { return fmax(x, 0.0) + log1p(exp(-fabs(x))); }

// log(1 + t) for t in [0, 1], within 2 ulp: 2 atanh(s) with s = t / (2 + t). The polynomial
// interpolates atanh(s) / s in s^2 at Chebyshev's points. It has fewer instructions than log1p,
// which is most of what a score of every expert costs.
__device__ inline double log1p_of_fraction(double t) {
  const double s = t / (2.0 + t), square = s * s;
  constexpr double kCoefficients[] = {
      0.08527514724177782, 0.041594020268004364, 0.0605572073559052,  0.06650107986282573,
      0.07693313020224316, 0.09090870128830139,  0.11111112048995372, 0.14285714272573605,
      0.20000000000094287, 0.3333333333333307};
  double sum = kCoefficients[0];
#pragma unroll
  for (int i = 1; i < 10; ++i) sum = fma(sum, square, kCoefficients[i]);
  return fma(2.0 * s, square * sum, 2.0 * s);
}

// Below kFar, softplus(x) is exp(x) * (1 - exp(x) / 2) in float64.
constexpr double kFar = -20.0;

__device__ inline double log_softplus(double x) {
  return x < kFar ? x - 0.5 * exp(x) : log(softplus(x));
}

__device__ inline double score_of(int kind, const Normalizer& normalizer, double logit) {
  if (kind == kSoftmax) return normalizer.probability(logit);
  if (kind == kSigmoid) return sigmoid(logit);
  return sqrt(fmax(logit, 0.0) + log1p_of_fraction(exp(-fabs(logit))));
}

// Up to a constant of the token, which renormalisation cancels.
__device__ inline double log_score_of(int kind, double logit) {
  if (kind == kSoftmax) return logit;
  if (kind == kSigmoid) return fmin(logit, 0.0) - log1p(exp(-fabs(logit)));
  return 0.5 * log_softplus(logit);
}

// d log(score) / d logit, without the softmax's normaliser.
__device__ inline double log_slope_of(int kind, double logit) {
  if (kind == kSoftmax) return 1.0;
  if (kind == kSigmoid) return sigmoid(-logit);
  return 0.5 * (logit < kFar ? 1.0 - 0.5 * exp(logit) : sigmoid(logit) / softplus(logit));
}

// The unscaled weight of this lane's expert. logit: -infinity on lanes without one, whose weight
// is 0. The normaliser is read only without renormalisation, for softmax.
__device__ inline double weight_of(const RouterParams& p, const Normalizer& normalizer,
                                   double logit) {
  if (!p.renormalize) {
    return logit == -CUDART_INF ? 0.0 : score_of(p.kind, normalizer, logit);
  }
  const double log_score = log_score_of(p.kind, logit), largest = warp_max(log_score);
  if (largest == -CUDART_INF) return 0.0;
  const double share = exp(log_score - largest);
  return share / warp_sum(share);
}

}  // namespace cometrt
