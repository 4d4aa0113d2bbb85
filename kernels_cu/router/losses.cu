// Losses of routers: sums over the tokens of a sequence, and the gradient of the logits. A warp
// handles one token at a time. NaN or +infinity in a token's logits makes its sums and its gradient
// NaN.
#include "router/scores.cuh"

using namespace cometrt;

namespace {

constexpr int kSumBlocksPerSm =
    kPerLane > 8 ? 2 : 6;  // router_loss_sums keeps its sums in registers

// Counts the token's pairs by expert, unless counts is null. Returns, on all lanes, whether it has
// any. Without ids: true.
__device__ bool keeps_pairs(const RouterParams& p, int token, int* counts) {
  if (p.ids == nullptr) return true;
  bool any = false;
  for (int k = lane_index(); k < p.topk; k += 32) {
    const long long id = load_id(p, static_cast<long long>(token) * p.topk + k);
    if (id < 0 || id >= p.num_experts) continue;
    any = true;
    if (counts != nullptr) atomicAdd(&counts[id], 1);
  }
  return __any_sync(~0u, any);
}

}  // namespace

// Each block sums LOSS_CHUNK_TOKENS tokens of a sequence into one row of l.sums [2 E + 3]. With
// ids, tokens without a pair count nowhere. The row has: each expert's sum of probabilities, each
// expert's number of pairs, the number of tokens, the sum of logsumexp^2, and the number of tokens
// in that sum. Tokens whose logits are all -infinity are left out of the last two.
extern "C" __global__ void __launch_bounds__(32 * kWarps, kSumBlocksPerSm)
    router_loss_sums(const __grid_constant__ RouterParams p,
                     const __grid_constant__ RouterLossParams l) {
  __shared__ double rows[kWarps][kMaxExperts];
  __shared__ double totals[kWarps][3];
  __shared__ int counts[kMaxExperts];
  for (int expert = threadIdx.x; expert < p.num_experts; expert += blockDim.x) counts[expert] = 0;
  __syncthreads();
  const int sequence = blockIdx.x / l.chunks_per_sequence, warp = threadIdx.x / 32;
  const int chunk = blockIdx.x % l.chunks_per_sequence;
  const int first = sequence * l.sequence_tokens;
  const int begin = first + chunk * COMETRT_LOSS_CHUNK_TOKENS;
  const int end = min(begin + COMETRT_LOSS_CHUNK_TOKENS, first + l.sequence_tokens);
  double* row = rows[warp];
  double sums[kPerLane] = {}, num_tokens = 0, sum_of_squares = 0, num_squares = 0;
  for (int token = begin + warp; token < end; token += kWarps) {
    if (!keeps_pairs(p, token, counts)) continue;
    num_tokens += 1;
    load_row(p, token, row);
    const Normalizer normalizer = normalizer_of(p.num_experts, row);
    if (normalizer.sum == 0) continue;  // all logits are -infinity
#pragma unroll
    for (int i = 0; i < kPerLane; ++i)
      sums[i] += normalizer.probability(row[i * 32 + lane_index()]);
    const double logsumexp = normalizer.logsumexp();
    sum_of_squares += logsumexp * logsumexp;
    num_squares += 1;
  }
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) row[i * 32 + lane_index()] = sums[i];
  if (lane_index() == 0) {
    totals[warp][0] = num_tokens, totals[warp][1] = sum_of_squares, totals[warp][2] = num_squares;
  }
  __syncthreads();
  double* out = l.sums + static_cast<long long>(blockIdx.x) * (2 * p.num_experts + 3);
  for (int expert = threadIdx.x; expert < p.num_experts; expert += blockDim.x) {
    double sum = 0;
    for (int i = 0; i < kWarps; ++i) sum += rows[i][expert];
    out[expert] = sum;
    out[p.num_experts + expert] = counts[expert];
  }
  if (threadIdx.x < 3) {
    double sum = 0;
    for (int i = 0; i < kWarps; ++i) sum += totals[i][threadIdx.x];
    out[2 * p.num_experts + threadIdx.x] = sum;
  }
}

// dlogits [T, E] = p * (balance_factor * (f - sum(f * p)) + z_factor * logsumexp), with the softmax
// p and the sequence's fractions f. 0 for tokens without a pair, or with logits all -infinity.
extern "C" __global__ void __launch_bounds__(32 * kWarps, kBlocksPerSm)
    router_loss_backward(const __grid_constant__ RouterParams p,
                         const __grid_constant__ RouterLossParams l) {
  __shared__ double rows[kWarps][kMaxExperts];
  const int token = blockIdx.x * kWarps + threadIdx.x / 32, lane = lane_index();
  if (token >= p.num_tokens) return;
  double* row = rows[threadIdx.x / 32];
  float* dlogits = p.dlogits + static_cast<long long>(token) * p.num_experts;
  load_row(p, token, row);
  const Normalizer normalizer = normalizer_of(p.num_experts, row);
  if (!keeps_pairs(p, token, nullptr) || normalizer.sum == 0) {
    for (int expert = lane; expert < p.num_experts; expert += 32) dlogits[expert] = 0;
    return;
  }
  const int sequence = token / l.sequence_tokens;
  double factor = 0, mean = 0, constant = 0;
  const double* fractions = l.fractions + static_cast<long long>(sequence) * l.fractions_stride;
  if (l.fractions != nullptr) {
    factor = l.balance_factors[sequence];
#pragma unroll 2
    for (int expert = lane; expert < p.num_experts; expert += 32) {
      const double probability = normalizer.probability(row[expert]);
      row[expert] = probability;
      mean += fractions[expert] * probability;
    }
    mean = warp_sum(mean);
  }
  if (l.z_factor != nullptr) constant = *l.z_factor * normalizer.logsumexp();
#pragma unroll 2
  for (int expert = lane; expert < p.num_experts; expert += 32) {
    const bool balances = l.fractions != nullptr;
    const double probability = balances ? row[expert] : normalizer.probability(row[expert]);
    const double slope = balances ? factor * (fractions[expert] - mean) + constant : constant;
    dlogits[expert] = static_cast<float>(probability * slope);
  }
}
