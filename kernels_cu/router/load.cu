// The experts' load: its statistics, and the bias that balances it. One block each: E is at most
// 1,024.
#include "router/elements.cuh"

using namespace cometrt;

namespace {

constexpr int kThreads = 1024;

// Ids outside [0, E) are left out. All loads of a thread are in flight together.
template <typename Id>
__device__ inline void count_ids(const Id* ids, long long num_ids, int num_experts, int* counts) {
  constexpr int kLoads = 8;
  for (long long begin = threadIdx.x; begin < num_ids; begin += kLoads * kThreads) {
    Id loaded[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const long long index = begin + i * kThreads;
      loaded[i] = index < num_ids ? ids[index] : -1;
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      if (loaded[i] >= 0 && loaded[i] < num_experts) atomicAdd(&counts[loaded[i]], 1);
    }
  }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads)
    router_load(const __grid_constant__ RouterLoadParams p) {
  __shared__ int counts[kThreads];
  __shared__ double warps[32];
  const int expert = threadIdx.x;
  counts[expert] = 0;
  __syncthreads();
  if (p.ids_are_64) {
    count_ids(static_cast<const long long*>(p.ids), p.num_ids, p.num_experts, counts);
  } else {
    count_ids(static_cast<const int*>(p.ids), p.num_ids, p.num_experts, counts);
  }
  __syncthreads();
  const bool has_expert = expert < p.num_experts;
  const int count = counts[expert];
  if (has_expert) p.counts[expert] = count;
  const double num_pairs = block_sum(count, warps), largest = block_max(count, warps);
  const double idle = block_sum(has_expert && count == 0, warps);
  const double mean = num_pairs / p.num_experts;
  const double deviation = has_expert ? count - mean : 0.0;
  const double variance = block_sum(deviation * deviation, warps) / p.num_experts;
  if (expert == 0) p.counts[p.num_experts] = static_cast<int>(idle);
  if (expert >= 3) return;  // a ratio each
  const double num_ids = p.num_ids, deviations = sqrt(variance);
  const double below = expert == 2 ? num_ids : mean;
  const double above = expert == 0 ? largest : expert == 1 ? deviations : num_ids - num_pairs;
  p.statistics[expert] = below > 0 ? above / below : 0.0;
}

// bias += rate * sign(mean(counts) - counts)
extern "C" __global__ void __launch_bounds__(kThreads)
    router_update_bias(const __grid_constant__ RouterBiasParams p) {
  __shared__ double warps[32];
  const int expert = threadIdx.x;
  const bool has_expert = expert < p.num_experts;
  const double count = has_expert ? load_number(p.counts, p.counts_type, expert) : 0.0;
  const double missing = block_sum(count, warps) / p.num_experts - count;
  if (!has_expert) return;
  const double sign = missing > 0 ? 1.0 : missing < 0 ? -1.0 : missing;  // NaN stays
  const long long at = static_cast<long long>(expert) * p.bias_stride;
  const double bias = load_element(p.bias, p.bias_type, at);
  store_element(p.bias, p.bias_type, at, bias + p.rate * sign);
}
