// The routers: top-k choice with weights, weights of given ids, and the gradient of the logits. One
// warp per token; a token's row of float64 lies in shared memory. Tokens are independent.
//
// A caller's error cannot be raised here. Such a token gets NaN weights with valid ids, or a NaN
// gradient: NaN or +infinity in its logits, a bias that is not finite, ids that are out of range or
// repeated.
#include "router/choice.cuh"
#include "router/scores.cuh"

using namespace cometrt;

namespace {

__device__ int token_of_warp() { return blockIdx.x * kWarps + threadIdx.x / 32; }

__device__ bool needs_normalizer(const RouterParams& p) {
  return p.kind == kSoftmax && !p.renormalize;
}

// The caller's id of this lane, -1 on lanes from topk on. `valid` becomes false, on all lanes, if
// one is out of range or repeated.
__device__ int given_id(const RouterParams& p, int token, bool& valid) {
  const int lane = lane_index();
  const long long id =
      lane < p.topk ? load_id(p, static_cast<long long>(token) * p.topk + lane) : -1;
  const bool in_range = id >= -1 && id < p.num_experts;
  const int known = in_range ? static_cast<int>(id) : -1;
  const u32 equal = __match_any_sync(~0u, known >= 0 ? known : -1 - lane);
  valid = __all_sync(~0u, valid && in_range && __popc(equal) == 1);
  return known;
}

}  // namespace

// ids [T, K], best first, and weights [T, K].
extern "C" __global__ void __launch_bounds__(32 * kWarps, kBlocksPerSm)
    router_topk(const __grid_constant__ RouterParams p) {
  __shared__ double rows[kWarps][kMaxExperts];
  const int token = token_of_warp(), lane = lane_index();
  if (token >= p.num_tokens) return;
  double* row = rows[threadIdx.x / 32];
  bool valid = load_row(p, token, row);
  const bool by_score = p.bias != nullptr || (p.num_groups > 1 && p.sum_of_two);
  Normalizer normalizer = {0.0, 1.0};
  if (needs_normalizer(p) || (by_score && p.kind == kSoftmax)) {
    normalizer = normalizer_of(p.num_experts, row);
  }
  if (by_score) valid = to_choice(p, normalizer, row) && valid;
  __syncwarp();
  if (p.num_groups > 1) limit_to_groups(p, row);
  __syncwarp();
  const int id = largest(p, row);
  const long long logit_at = static_cast<long long>(token) * p.num_experts + id;
  const double logit = id < 0 ? -CUDART_INF : load_element(p.logits, p.logits_type, logit_at);
  const double weight = weight_of(p, normalizer, logit);
  if (lane >= p.topk) return;
  const long long at = static_cast<long long>(token) * p.topk + lane;
  p.out_ids[at] = valid ? id : lane;
  p.out_weights[at] = static_cast<float>(valid ? p.scale * weight : CUDART_NAN);
}

// Weights [T, K] of given ids [T, K].
extern "C" __global__ void __launch_bounds__(32 * kWarps, kBlocksPerSm)
    router_weights(const __grid_constant__ RouterParams p) {
  __shared__ double rows[kWarps][kMaxExperts];
  const int token = token_of_warp(), lane = lane_index();
  if (token >= p.num_tokens) return;
  double* row = rows[threadIdx.x / 32];
  bool valid = load_row(p, token, row);
  Normalizer normalizer = {0.0, 1.0};
  if (needs_normalizer(p)) normalizer = normalizer_of(p.num_experts, row);
  __syncwarp();
  const int id = given_id(p, token, valid);
  const double weight = weight_of(p, normalizer, id < 0 ? -CUDART_INF : row[id]);
  if (lane >= p.topk) return;
  p.out_weights[static_cast<long long>(token) * p.topk + lane] =
      static_cast<float>(valid ? p.scale * weight : CUDART_NAN);
}

// dlogits [T, E] from dweights [T, K], for given ids. The dweight of an id -1 is not read.
extern "C" __global__ void __launch_bounds__(32 * kWarps, kBlocksPerSm)
    router_backward(const __grid_constant__ RouterParams p) {
  __shared__ double rows[kWarps][kMaxExperts];
  const int token = token_of_warp(), lane = lane_index();
  if (token >= p.num_tokens) return;
  double* row = rows[threadIdx.x / 32];
  bool valid = load_row(p, token, row);
  Normalizer normalizer = {0.0, 1.0};
  if (needs_normalizer(p)) normalizer = normalizer_of(p.num_experts, row);
  __syncwarp();
  const int id = given_id(p, token, valid);
  const double logit = id < 0 ? -CUDART_INF : row[id];
  const long long at = static_cast<long long>(token) * p.topk + lane;
  const double dweight =
      logit == -CUDART_INF ? 0.0 : p.scale * load_element(p.dweights, p.dweights_type, at);
  const double weight = weight_of(p, normalizer, logit);
  const double mean = p.kind == kSoftmax || p.renormalize ? warp_sum(weight * dweight) : 0.0;
  const double dlogit = weight * (dweight - mean) * log_slope_of(p.kind, logit);

  // Only the softmax over all experts has gradients beside the chosen ones.
  float* dlogits = p.dlogits + static_cast<long long>(token) * p.num_experts;
  const double invalid = valid ? 0.0 : CUDART_NAN;
#pragma unroll 2
  for (int expert = lane; expert < p.num_experts; expert += 32) {
    const double others =
        needs_normalizer(p) && mean != 0 ? -mean * normalizer.probability(row[expert]) : 0.0;
    dlogits[expert] = static_cast<float>(others + invalid);
  }
  __syncwarp();
  if (valid && logit > -CUDART_INF) dlogits[id] = static_cast<float>(dlogit);
}
