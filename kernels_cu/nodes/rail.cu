// What a call over several nodes does around the calls of its node's layer. With one slice all
// launches and transfers are on one stream:
//
//     rail_pack -> NCCL -> rail_localize -> the node's call -> rail_outcome -> NCCL -> rail_add
//
// With several, transfers are on a stream of their own:
//
//     rail_pack -> rail_localize (own) -> own tokens -> parts -> own tokens ------------> rail_add
//               \ -> NCCL -> rail_localize (others) / \ -> NCCL ... -> NCCL (outcomes) /
//
// rail_step stands between transfers, and rail_outcome behind each call of the node's layer. No
// kernel here waits for another rank: the host watches `steps`, and aborts a transfer that lasts
// too long.
#include "common/packed_rows.cuh"
#include "nodes/rail_params.cuh"
#include "protocol/wait.cuh"

using namespace cometrt;

namespace {

constexpr int kThreads = 256;

__device__ inline long long first_index() {
  return static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
}

__device__ inline long long index_step() { return static_cast<long long>(gridDim.x) * blockDim.x; }

// By one thread. Transfers follow each other, so there is one writer at a time.
__device__ void count_steps(const RailParams& params) {
  volatile u64* steps = params.steps;
  const u64 newest = steps[0];
  if (params.ends) steps[1] = newest;
  if (params.begins) steps[0] = 2 * (newest / 2 + 1) + params.begins - 1;
}

// By one thread: whether all ranks of the rail make the same call.
__device__ bool same_calls(const RailParams& params) {
  const RailHeader& mine = params.header(params.node);
  bool same = true;
  for (int node = 0; node < params.nodes; ++node) {
    const RailHeader& other = params.header(node);
    same &= other.operation == mine.operation && other.layer == mine.layer &&
            other.spec_hash == mine.spec_hash && other.forward == mine.forward;
  }
  return same;
}

// The ids of one token for this node: those of experts on other nodes become -1. An id that breaks
// a rule becomes one that breaks it on every node, so that all of them find the same pair.
__device__ void localize(const RailParams& params, const int* ids, int* local) {
  const int experts = params.num_experts / params.nodes, first = params.node * experts;
  for (int k = 0; k < params.topk; ++k) {
    const int id = ids[k];
    bool wrong = id < -1 || id >= params.num_experts;
    for (int other = 0; other < k; ++other) wrong |= id >= 0 && ids[other] == id;
    const bool here = id >= first && id < first + experts;
    local[k] = wrong ? experts : here ? id - first : -1;
  }
}

__device__ RailOutcome outcome_of(const RailParams& params) {
  RailOutcome outcome = {};
  const ExchangeState& state = *params.state;
  if (is_stopped(params.world)) {
    outcome.kind = kWorldStopped;
  } else if (!state.ok) {
    outcome.kind = state.status == kInert ? kCallHeld : kCallFailed;
    if (params.progress != nullptr && state.status == kActive) {
      outcome.largest_need = params.progress->largest_need;
      outcome.wrong_pair = params.progress->wrong_pair;
    }
  }
  return outcome;
}

// By one thread, of a call that has completed on this node alone: else `finish` has reported it.
// In a stopped world the other nodes' outcomes may never have arrived.
__device__ void report_other_node(const RailParams& params) {
  volatile RailReport& report = *params.report;
  if (params.outcomes[params.node].kind != kCompleted || report.kind != kCompleted) return;
  if (is_stopped(params.world)) {
    report.node = params.node;
    report.largest_need = report.wrong_pair = 0;
    fence_host();
    report.kind = kWorldStopped;
    return;
  }
  for (int node = 0; node < params.nodes; ++node) {
    const RailOutcome& outcome = params.outcomes[node];
    if (outcome.kind == kCompleted || outcome.kind == kCallHeld) continue;
    report.node = node;
    report.largest_need = outcome.largest_need;
    report.wrong_pair = outcome.wrong_pair;
    fence_host();
    report.kind = outcome.kind;
    return;
  }
}

// By a thread: eight columns of this rank's token, summed over the nodes in their order.
__device__ void add_vector(const RailParams& params, long long index) {
  // The arrays of 2^32 vectors would not fit into the memory of a GPU.
  const unsigned vector = static_cast<unsigned>(index), vectors = params.hidden / 8;
  const unsigned token = vector / vectors, column = vector % vectors;
  float sum[8] = {};
  for (int node = 0; node < params.nodes; ++node) {
    const __nv_bfloat16* rows = node == params.node ? params.partials : params.returned;
    const long long row = params.row_of(node, token);
    add_row(sum, rows + row * params.hidden + 8 * column, 1.0f);
  }
  store_row(params.out + 8 * index, sum);
}

__device__ float add_dweight(const RailParams& params, long long index) {
  const int token = index / params.topk, k = index % params.topk;
  float sum = 0.0f;
  for (int node = 0; node < params.nodes; ++node) {
    const float* values = node == params.node ? params.dweight_partials : params.returned_dweight;
    sum += values[params.row_of(node, token) * params.topk + k];
  }
  return sum;
}

}  // namespace

// Copies this rank's rows to their place among those of its rail, and writes its message.
extern "C" __global__ void __launch_bounds__(kThreads)
    rail_pack(const __grid_constant__ RailParams params) {
  const long long first = first_index(), step = index_step();
  const long long row_bytes = 2ll * params.hidden;
  uint4* target =
      reinterpret_cast<uint4*>(params.all_rows + params.row_of(params.node, 0) * row_bytes);
  const uint4* source = static_cast<const uint4*>(params.rows);
  if (source != nullptr && source != target) {
    const long long vectors = params.num_tokens * row_bytes / 16;
    for (long long i = first; i < vectors; i += step) target[i] = source[i];
  }
  if (params.id_bytes != 0) {
    const long long pairs = static_cast<long long>(params.num_tokens) * params.topk;
    const long long all_pairs = static_cast<long long>(params.max_tokens) * params.topk;
    int* ids = params.message_ids(params.node);
    float* weights = params.message_weights(params.node);
    for (long long i = first; i < all_pairs; i += step) {
      long long id = -1;
      if (i < pairs) {
        id = params.id_bytes == 8 ? static_cast<const long long*>(params.ids)[i]
                                  : static_cast<const int*>(params.ids)[i];
        id = max(-2147483648ll, min(2147483647ll, id));  // stays out of range; it must not wrap
      }
      ids[i] = static_cast<int>(id);
      weights[i] = i < pairs ? params.weights[i] : 0.0f;
    }
  }
  if (first == 0) {
    RailHeader& header = params.header(params.node);
    header.operation = params.operation;
    header.layer = params.layer;
    header.spec_hash = params.spec_hash;
    header.forward = params.forward;
    count_steps(params);
  }
}

// Turns tables of the rail, this rank's or others', into those of this node's experts. With the
// others' it stops the world if the ranks of the rail make different calls: then the node's calls
// are inert.
extern "C" __global__ void __launch_bounds__(kThreads)
    rail_localize(const __grid_constant__ RailParams params) {
  const long long first = first_index(), step = index_step();
  const long long tokens = params.id_bytes == 0 ? 0ll : 1ll * params.nodes * params.max_tokens;
  for (long long index = first; index < tokens; index += step) {
    const int node = index / params.max_tokens, token = index % params.max_tokens;
    if (!(node == params.node ? params.own : params.others)) continue;
    const long long from = 1ll * token * params.topk;
    const long long to = params.row_of(node, token) * params.topk;
    localize(params, params.message_ids(node) + from, params.all_ids + to);
    for (int k = 0; k < params.topk; ++k) {
      params.all_weights[to + k] = params.message_weights(node)[from + k];
    }
  }
  if (first != 0) return;
  count_steps(params);
  if (params.others && !same_calls(params) && !is_stopped(params.world)) {
    const u64 epoch = params.world.epoch() + 1;
    stop_world(params.world, kMismatch, {kSourceReady, params.node, -1, -1}, epoch, 0, 0);
  }
}

// One thread: how the node's calls have ended, for the other nodes. The first slice that fails
// counts: those behind it are inert.
extern "C" __global__ void __launch_bounds__(32)
    rail_outcome(const __grid_constant__ RailParams params) {
  if (threadIdx.x != 0) return;
  RailOutcome& outcome = params.outcomes[params.node];
  if (params.slice == 0 || outcome.kind == kCompleted) {
    outcome = outcome_of(params);
    volatile u64& failed = params.steps[2];
    const bool of_plan = params.progress != nullptr && params.state->status == kActive;
    if (outcome.kind == kCallFailed && of_plan && failed == 0) {
      failed = 256 * static_cast<u64>(params.layer) + params.slice + 1;
    }
  }
  count_steps(params);
}

// One thread: ends a transfer, begins another, or both.
extern "C" __global__ void __launch_bounds__(32)
    rail_step(const __grid_constant__ RailParams params) {
  if (threadIdx.x == 0) count_steps(params);
}

// Adds the partial sums of all nodes. If the call has failed on any node, or the world has stopped,
// the results become NaN: then what was returned may be of an earlier call.
extern "C" __global__ void __launch_bounds__(kThreads)
    rail_add(const __grid_constant__ RailParams params) {
  __shared__ bool failed;
  if (threadIdx.x == 0) {
    bool any = is_stopped(params.world);
    for (int node = 0; node < params.nodes; ++node) {
      any |= params.outcomes[node].kind != kCompleted;
    }
    failed = any;
  }
  __syncthreads();
  const long long first = first_index(), step = index_step();
  const float nan = __int_as_float(0x7fffffff);
  const long long vectors = 1ll * params.num_tokens * params.hidden / 8;
  const float nans[8] = {nan, nan, nan, nan, nan, nan, nan, nan};
  for (long long i = first; params.out != nullptr && i < vectors; i += step) {
    if (failed) {
      store_row(params.out + 8 * i, nans);
    } else {
      add_vector(params, i);
    }
  }
  const long long pairs = 1ll * params.num_tokens * params.topk;
  for (long long i = first; params.out_dweight != nullptr && i < pairs; i += step) {
    params.out_dweight[i] = failed ? nan : add_dweight(params, i);
  }
  if (first != 0) return;
  const bool failed_here = params.outcomes[params.node].kind != kCompleted;
  for (int slice = 0; failed_here && slice < params.num_epochs; ++slice) *params.epochs[slice] = 0;
  report_other_node(params);
  count_steps(params);
}
