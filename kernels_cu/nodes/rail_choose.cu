// Chooses which tokens of this rank cross to which node, where only wanted ones do: as
// cometrt/nodes/crossing.py. It is in front of rail_pack (nodes/rail.cu).
#include "nodes/rail_ids.cuh"

using namespace cometrt;

namespace {

constexpr int kThreads = 1024;

// The id for a node of pair k of this rank's token.
__device__ int id_for(const RailParams& params, int node, int token, int k) {
  const long long first_pair = 1ll * token * params.topk;
  const int id = id_of(params, first_pair + k);
  bool wrong = id < -1 || id >= params.num_experts || !isfinite(params.weights[first_pair + k]);
#pragma unroll 1  // else registers spill
  for (int other = 0; other < k; ++other) {
    wrong |= id >= 0 && id_of(params, first_pair + other) == id;
  }
  if (wrong) return kWrongPair - static_cast<int>(first_pair + k);
  const int experts = params.num_experts / params.nodes, first = node * experts;
  return id >= first && id < first + experts ? id - first : kNotHere;
}

// By the threads of a CTA, which call it together: how many of them before this one say yes, and
// how many do in all.
__device__ int count_before(bool yes, int* total) {
  __shared__ int of_warp[kThreads / 32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const u32 ballot = __ballot_sync(~0u, yes);
  if (lane == 0) of_warp[warp] = __popc(ballot);
  __syncthreads();
  int before = __popc(ballot & ((1u << lane) - 1));
  *total = 0;
  for (int other = 0; other < kThreads / 32; ++other) {
    before += other < warp ? of_warp[other] : 0;
    *total += of_warp[other];
  }
  __syncthreads();  // of_warp may be written again
  return before;
}

// By a thread: the tables of this rank's token for a node, at a place of them. Returns the first
// pair that breaks a rule.
__device__ int put_pairs(const RailParams& params, int node, int token, int* ids, float* weights) {
  int wrong = kNoWrongPair;
#pragma unroll 1
  for (int k = 0; k < params.topk; ++k) {
    const int id = id_for(params, node, token, k);
    if (id < kNotHere) wrong = min(wrong, kWrongPair - id);
    ids[k] = node == params.node ? params.plan_expert(id, node, token) : id;
    weights[k] = params.weights[1ll * token * params.topk + k];
  }
  return wrong;
}

// By a thread: tables of no token.
__device__ void put_no_pairs(const RailParams& params, int* ids, float* weights) {
  for (int k = 0; k < params.topk; ++k) {
    ids[k] = kNotHere;
    weights[k] = 0.0f;
  }
}

}  // namespace

// A CTA a node: chooses the tokens that cross to it, in their order, and writes their tables. That
// of this rank's node writes the tables of all of this rank's tokens to where its call finds them.
extern "C" __global__ void __launch_bounds__(kThreads)
    rail_choose(const __grid_constant__ RailParams params) {
  __shared__ int first_wrong;  // pair
  if (threadIdx.x == 0) first_wrong = kNoWrongPair;
  __syncthreads();
  const int node = blockIdx.x;
  const bool here = node == params.node;
  const RailMessage message = params.outgoing_message(node);
  int* message_ids = message.ids();
  float* message_weights = params.weights_of(message);
  int count = 0;
  for (int begin = 0; begin < params.max_tokens; begin += kThreads) {
    const int token = begin + threadIdx.x;
    bool wanted = false;
#pragma unroll 1
    for (int k = 0; !here && token < params.num_tokens && k < params.topk; ++k) {
      wanted |= id_for(params, node, token, k) != kNotHere;
    }
    int more;
    const int slot = count + count_before(wanted, &more);
    const bool crosses = wanted && slot < params.crossing;
    count += more;
    if (token >= params.max_tokens) continue;  // the CTA's last turn
    params.slots[1ll * node * params.max_tokens + token] = crosses ? slot : -1;
    if (here) {
      const long long pair = params.row_of(node, token) * params.topk;
      if (token < params.num_tokens) {
        const int wrong =
            put_pairs(params, node, token, params.all_ids + pair, params.all_weights + pair);
        if (wrong != kNoWrongPair) atomicMin(&first_wrong, wrong);
      } else {
        put_no_pairs(params, params.all_ids + pair, params.all_weights + pair);
      }
    } else if (crosses) {
      const long long pair = 1ll * slot * params.topk;
      put_pairs(params, node, token, message_ids + pair, message_weights + pair);
    }
  }
  for (int slot = count + threadIdx.x; !here && slot < params.crossing; slot += kThreads) {
    const long long pair = 1ll * slot * params.topk;
    put_no_pairs(params, message_ids + pair, message_weights + pair);
  }
  __syncthreads();
  if (threadIdx.x == 0) params.counts[node] = here ? first_wrong : count;
}
