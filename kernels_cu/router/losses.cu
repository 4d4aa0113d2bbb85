// The balance loss and the z-loss of routers: sums over chunks of tokens, the loss, and the
// gradient of the logits. NaN or +infinity in a token's logits makes the loss and its gradient NaN.
//
// The order of all additions is fixed, so results repeat bit by bit.
#include "router/scores.cuh"

using namespace cometrt;

namespace {

constexpr int kSumBlocksPerSm = kPerLane > 8 ? 2 : 6;  // its sums lie in registers
constexpr int kTotalsWarps = 32;

// The number of the token's kept pairs, on all lanes, and 1 without ids. Counts them by expert,
// unless counts is null.
__device__ int kept_pairs(const RouterParams& p, int token, int* counts) {
  if (p.ids == nullptr) return 1;
  u32 kept = 0;
  for (int k = lane_index(); k < p.topk; k += 32) {
    const long long id = load_id(p, static_cast<long long>(token) * p.topk + k);
    if (id < 0 || id >= p.num_experts) continue;
    kept += 1;
    if (counts != nullptr) atomicAdd(&counts[id], 1);
  }
  return __reduce_add_sync(~0u, kept);
}

// Columns of chunk_sums before its last two.
__device__ int num_loss_experts(const RouterParams& p, const RouterLossParams& l) {
  return l.balance ? p.num_experts : 0;
}

}  // namespace

// Each block adds up a chunk of a sequence's tokens, a warp one at a time, into a row of
// chunk_sums. Balance loss: each expert's probability, over tokens with a kept pair; the pairs of
// each expert; the number of those tokens; the number of pairs. z-loss: the sum of logsumexp^2, and
// the number of tokens in it, which have a kept pair and an expert that may be chosen.
extern "C" __global__ void __launch_bounds__(32 * kWarps, kSumBlocksPerSm)
    router_loss_sums(const __grid_constant__ RouterParams p,
                     const __grid_constant__ RouterLossParams l) {
  __shared__ double rows[kWarps][kMaxExperts];
  __shared__ double totals[kWarps][2];
  __shared__ int counts[kMaxExperts];
  const int num_experts = num_loss_experts(p, l);
  for (int expert = threadIdx.x; expert < num_experts; expert += blockDim.x) counts[expert] = 0;
  if (blockIdx.x == 0 && threadIdx.x == 0) *l.num_done = 0;
  __syncthreads();
  const int sequence = blockIdx.x / l.chunks_per_sequence, warp = threadIdx.x / 32;
  const int chunk = blockIdx.x % l.chunks_per_sequence;
  const int first = sequence * l.sequence_tokens;
  const int begin = first + chunk * l.chunk_tokens;
  const int end = min(begin + l.chunk_tokens, first + l.sequence_tokens);
  double* row = rows[warp];
  double sums[kPerLane] = {}, total[2] = {};
  for (int token = begin + warp; token < end; token += kWarps) {
    const int num_pairs = kept_pairs(p, token, l.balance ? counts : nullptr);
    if (num_pairs == 0) continue;
    load_row(p, token, row);
    const Normalizer normalizer = normalizer_of(p.num_experts, row);
    if (l.balance) total[0] += 1, total[1] += num_pairs;
    if (normalizer.sum == 0) continue;  // no expert may be chosen
    if (l.balance) {
#pragma unroll
      for (int i = 0; i < kPerLane; ++i)
        sums[i] += normalizer.probability(row[i * 32 + lane_index()]);
    } else {
      const double logsumexp = normalizer.logsumexp();
      total[0] += logsumexp * logsumexp, total[1] += 1;
    }
  }
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) row[i * 32 + lane_index()] = sums[i];
  if (lane_index() == 0) totals[warp][0] = total[0], totals[warp][1] = total[1];
  __syncthreads();
  double* out = l.chunk_sums + static_cast<long long>(blockIdx.x) * (2 * num_experts + 2);
  for (int expert = threadIdx.x; expert < num_experts; expert += blockDim.x) {
    double sum = 0;
    for (int i = 0; i < kWarps; ++i) sum += rows[i][expert];
    out[expert] = sum;
    out[num_experts + expert] = counts[expert];
  }
  if (threadIdx.x < 2) {
    double sum = 0;
    for (int i = 0; i < kWarps; ++i) sum += totals[i][threadIdx.x];
    out[2 * num_experts + threadIdx.x] = sum;
  }
}

// The loss from the sums of all chunks. A block has a sequence and 32 of its experts, a lane each.
// The last block to finish adds up the terms of all.
//
// Balance loss: the mean, over sequences with a token, of
// factor * sum(pairs * probabilities), factor = E / (tokens * all pairs).
extern "C" __global__ void __launch_bounds__(32 * kTotalsWarps)
    router_loss_totals(const __grid_constant__ RouterParams p,
                       const __grid_constant__ RouterLossParams l) {
  __shared__ double sums[kTotalsWarps][3][32];
  __shared__ double warps[32];
  __shared__ bool is_last;
  const int num_experts = num_loss_experts(p, l), num_groups = max(1, (num_experts + 31) / 32);
  const int sequence = blockIdx.x / num_groups, group = blockIdx.x % num_groups;
  const int lane = lane_index(), warp = threadIdx.x / 32, expert = group * 32 + lane;
  const bool has_expert = expert < num_experts;
  const long long width = 2 * num_experts + 2;
  const double* rows = l.chunk_sums + sequence * width * l.chunks_per_sequence;
  double probability = 0, pairs = 0, total = 0;
#pragma unroll 4
  for (int chunk = warp; chunk < l.chunks_per_sequence; chunk += kTotalsWarps) {
    const double* row = rows + chunk * width;
    if (has_expert) probability += row[expert], pairs += row[num_experts + expert];
    if (lane < 2) total += row[2 * num_experts + lane];
  }
  sums[warp][0][lane] = probability, sums[warp][1][lane] = pairs, sums[warp][2][lane] = total;
  __syncthreads();
  if (warp == 0) {
    for (int i = 1; i < kTotalsWarps; ++i) {
      probability += sums[i][0][lane], pairs += sums[i][1][lane], total += sums[i][2][lane];
    }
    double numerator = __shfl_sync(~0u, total, 0), denominator = __shfl_sync(~0u, total, 1);
    if (l.balance) {
      const double num_tokens = numerator;
      double num_pairs = denominator;
      if (l.counts != nullptr) {
        num_pairs = 0;
        for (int i = lane; i < num_experts; i += 32) {
          num_pairs += load_number(l.counts, l.counts_type, i);
        }
        num_pairs = warp_sum(num_pairs);
        pairs = has_expert ? load_number(l.counts, l.counts_type, expert) : 0.0;
      }
      const double factor = num_experts / (fmax(num_tokens, 1.0) * fmax(num_pairs, 1.0));
      numerator = factor * warp_sum(pairs * probability);
      denominator = group == 0 && num_tokens > 0;
      if (has_expert) l.pairs[static_cast<long long>(sequence) * num_experts + expert] = pairs;
      if (group == 0 && lane == 0) l.factors[sequence] = factor;
    }
    if (lane == 0) {
      l.terms[2 * blockIdx.x] = numerator, l.terms[2 * blockIdx.x + 1] = denominator;
      fence_acq_rel_gpu();  // with the same fence of the last block: its threads read the terms
      is_last = fetch_add_relaxed_gpu(l.num_done, 1) == gridDim.x - 1;
      fence_acq_rel_gpu();
    }
  }
  __syncthreads();
  if (!is_last) return;
  double numerator = 0, denominator = 0;
  for (int i = threadIdx.x; i < gridDim.x; i += blockDim.x) {
    numerator += l.terms[2 * i], denominator += l.terms[2 * i + 1];
  }
  numerator = block_sum(numerator, warps);
  denominator = fmax(block_sum(denominator, warps), 1.0);
  if (threadIdx.x == 0) *l.loss = numerator / denominator, *l.denominator = denominator;
}

// dlogits [T, E] = p * (factor * (pairs - sum(pairs * p))) for the balance loss, and
// p * 2 * logsumexp for the z-loss, times dloss / denominator, with the softmax p. 0 for tokens
// that the loss does not count.
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
  if (kept_pairs(p, token, nullptr) == 0 || normalizer.sum == 0) {
    for (int expert = lane; expert < p.num_experts; expert += 32) dlogits[expert] = 0;
    return;
  }
  const double dloss = l.dloss != nullptr ? load_number(l.dloss, l.dloss_type, 0) : l.dloss_value;
  const double scale = dloss / *l.denominator;
  if (!l.balance) {
    const double slope = 2 * scale * normalizer.logsumexp();
#pragma unroll 2
    for (int expert = lane; expert < p.num_experts; expert += 32) {
      dlogits[expert] = static_cast<float>(slope * normalizer.probability(row[expert]));
    }
    return;
  }
  const int sequence = token / l.sequence_tokens;
  const double* pairs = l.pairs + static_cast<long long>(sequence) * p.num_experts;
  const double factor = scale * l.factors[sequence];
  double mean = 0;
#pragma unroll 2
  for (int expert = lane; expert < p.num_experts; expert += 32) {
    const double probability = normalizer.probability(row[expert]);
    row[expert] = probability;
    mean += pairs[expert] * probability;
  }
  mean = warp_sum(mean);
#pragma unroll 2
  for (int expert = lane; expert < p.num_experts; expert += 32) {
    dlogits[expert] = static_cast<float>(row[expert] * factor * (pairs[expert] - mean));
  }
}
