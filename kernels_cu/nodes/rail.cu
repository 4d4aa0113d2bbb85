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
// With late parts there is one call, which begins behind the tables, before rows have come:
//
//     rail_pack -> NCCL (tables) -> rail_localize -> the node's call -> rail_outcome -> rail_add
//                                               \ -> NCCL -> rail_ready, rail_wait -> NCCL /
//
// Where only wanted tokens cross, rail_choose (nodes/rail_choose.cu) comes first, if the call has
// tables, and there is no rail_localize of own ones. rail_step stands between transfers, and
// rail_outcome behind each call of the node's layer. No kernel here waits for another rank, but
// rail_wait for this rank's call: the host watches `steps`, and aborts a transfer that lasts too
// long.
#include "common/packed_rows.cuh"
#include "nodes/rail_ids.cuh"
#include "protocol/late_parts.cuh"

using namespace cometrt;

namespace {

constexpr int kThreads = 256;

__device__ inline long long first_index() {
  return static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
}

__device__ inline long long index_step() { return static_cast<long long>(gridDim.x) * blockDim.x; }

// By one thread. Transfers follow each other, so there is one writer at a time.
__device__ void end_step(const RailParams& params) {
  volatile u64* steps = params.steps;
  if (params.ends) steps[1] = steps[0];
}
__device__ void begin_step(const RailParams& params) {
  volatile u64* steps = params.steps;
  if (params.begins) steps[0] = 2 * (steps[0] / 2 + 1) + params.begins - 1;
}
__device__ void count_steps(const RailParams& params) {
  end_step(params);
  begin_step(params);
}

// By one thread, before any part of a call can arrive.
__device__ void begin_late_call(const RailParams& params) {
  ControlBlock& own = control_of(params.world, params.world.rank);
  if (own.generation == params.world.generation) ++own.rail_calls;
  for (int part = 0; part <= params.num_parts; ++part) params.part_sums[part] = 0;
}

// By one thread: whether all ranks of the rail make the same call.
__device__ bool same_calls(const RailParams& params) {
  const RailHeader& mine = params.message(params.node).header();
  bool same = true;
  for (int node = 0; node < params.nodes; ++node) {
    const RailHeader& other = params.message(node).header();
    same &= other.operation == mine.operation && other.layer == mine.layer &&
            other.spec_hash == mine.spec_hash && other.forward == mine.forward;
  }
  return same;
}

// The ids of one token for this node: those of experts on other nodes become -1. An id that breaks
// a rule becomes one that breaks it on every node, so that all of them find the same pair.
__device__ void localize(const RailParams& params, int of, int slot, const int* ids, int* local) {
  const int experts = params.num_experts / params.nodes, first = params.node * experts;
  for (int k = 0; k < params.topk; ++k) {
    const int id = ids[k];
    bool wrong = id < -1 || id >= params.num_experts;
    for (int other = 0; other < k; ++other) wrong |= id >= 0 && ids[other] == id;
    const bool here = id >= first && id < first + experts;
    local[k] = wrong ? kNoExpert : here ? params.plan_expert(id - first, of, slot) : -1;
  }
}

// By one thread, behind rail_choose: if more tokens should cross than may, the first pair of this
// rank breaks a rule on all nodes.
__device__ void mark_too_many(const RailParams& params) {
  int most = 0;
#pragma unroll 1
  for (int node = 0; node < params.nodes; ++node) {
    if (node != params.node) most = max(most, params.counts[node]);
  }
  if (most <= params.crossing) return;
  const int wrong = params.counts[params.node];
  const int mark = wrong != kNoWrongPair ? kWrongPair - wrong : kTooMany + min(most, kMostWanted);
  params.all_ids[params.row_of(params.node, 0) * params.topk] = mark;
#pragma unroll 1
  for (int node = 0; node < params.nodes; ++node) {
    if (node != params.node) params.outgoing_message(node).ids()[0] = mark;
  }
}

// By all threads of the grid, a warp a row: copies rows with slots to where they are sent from.
__device__ void pack_wanted(const RailParams& params) {
  const int vectors = params.hidden / 8, lane = threadIdx.x % 32;
  const long long rows = 1ll * (params.nodes - 1) * params.num_tokens;
  for (long long row = first_index() / 32; row < rows; row += index_step() / 32) {
    const int other = row / params.num_tokens, token = row % params.num_tokens;
    const int slot = params.slot_of(other + (other >= params.node), token);
    if (slot < 0) continue;
    const uint4* source =
        reinterpret_cast<const uint4*>(params.wanted_rows) + 1ll * token * vectors;
    uint4* target = reinterpret_cast<uint4*>(params.crossing_rows) +
                    (1ll * other * params.crossing + slot) * vectors;
#pragma unroll 2  // more would spill
    for (int i = lane; i < vectors; i += 32) target[i] = source[i];
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

// By a thread, if the world has stopped behind `finish`, which has not reported it then. Several
// may do so at once: they write the same.
__device__ void report_stop(const RailParams& params) {
  volatile RailReport& report = *params.report;
  if (params.state->reported || report.kind != kCompleted) return;
  report.node = params.node;
  report.largest_need = report.wrong_pair = 0;
  fence_host();
  report.kind = kWorldStopped;
}

// By one thread, if the call has failed on another node alone.
__device__ void report_other_node(const RailParams& params) {
  volatile RailReport& report = *params.report;
  if (params.state->reported || report.kind != kCompleted) return;
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
    const bool here = node == params.node;
    const int slot = here ? token : params.slot_of(node, token);
    if (slot < 0) continue;
    const __nv_bfloat16* rows = here ? params.partials : params.returned;
    add_row(sum, rows + params.row_of(node, slot) * params.hidden + 8 * column, 1.0f);
  }
  store_row(params.out + 8 * index, sum);
}

__device__ float add_dweight(const RailParams& params, long long index) {
  const int token = index / params.topk, k = index % params.topk;
  float sum = 0.0f;
  for (int node = 0; node < params.nodes; ++node) {
    const bool here = node == params.node;
    const int slot = here ? token : params.slot_of(node, token);
    if (slot < 0) continue;
    const float* values = here ? params.dweight_partials : params.returned_dweight;
    sum += values[params.row_of(node, slot) * params.topk + k];
  }
  return sum;
}

}  // namespace

// Copies this rank's rows to their place among those of its rail, or to where those that cross are
// sent from, and writes its message.
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
  if (params.wanted_rows != nullptr) pack_wanted(params);
  const RailMessage mine = params.message(params.node);
  if (params.id_bytes != 0 && params.slots == nullptr) {
    const long long pairs = static_cast<long long>(params.num_tokens) * params.topk;
    const long long all_pairs = static_cast<long long>(params.max_tokens) * params.topk;
    int* ids = mine.ids();
    float* weights = params.weights_of(mine);
    for (long long i = first; i < all_pairs; i += step) {
      ids[i] = i < pairs ? id_of(params, i) : kNotHere;
      weights[i] = i < pairs ? params.weights[i] : 0.0f;
    }
  }
  if (first != 0) return;
  RailHeader& header = mine.header();
  header.operation = params.operation;
  header.layer = params.layer;
  header.spec_hash = params.spec_hash;
  header.forward = params.forward;
  header.epoch = params.world.epoch() + 1;
#pragma unroll 1  // else registers spill
  for (int node = 0; params.slots != nullptr && node < params.nodes; ++node) {
    params.outgoing_message(node).header() = header;
  }
  if (params.id_bytes != 0 && params.slots != nullptr) mark_too_many(params);
  begin_late_call(params);
  count_steps(params);
}

// Turns tables of the rail, this rank's or others', into those of this node's experts; those of
// rail_choose are it already. With the others' it stops the world if the ranks of the rail make
// different calls: then the node's calls are inert. The host is told too, since transfers of
// different calls may never end.
extern "C" __global__ void __launch_bounds__(kThreads)
    rail_localize(const __grid_constant__ RailParams params) {
  const long long first = first_index(), step = index_step();
  const long long tokens = params.id_bytes == 0 ? 0ll : 1ll * params.nodes * params.crossing;
  for (long long index = first; index < tokens; index += step) {
    const int node = index / params.crossing, slot = index % params.crossing;
    if (!(node == params.node ? params.own : params.others)) continue;
    const RailMessage message = params.message(node);
    const long long from = 1ll * slot * params.topk, to = params.row_of(node, slot) * params.topk;
    const int* ids = message.ids() + from;
    if (params.slots == nullptr) localize(params, node, slot, ids, params.all_ids + to);
    for (int k = 0; k < params.topk; ++k) {
      if (params.slots != nullptr) params.all_ids[to + k] = params.plan_expert(ids[k], node, slot);
      params.all_weights[to + k] = params.weights_of(message)[from + k];
    }
  }
  if (first != 0) return;
  count_steps(params);
  if (params.others && !same_calls(params) && !is_stopped(params.world)) {
    const u64 epoch = params.message(params.node).header().epoch;
    stop_world(params.world, kMismatch, {kSourceReady, params.node, -1, -1}, epoch, 0, 0);
    static_cast<volatile u64*>(params.steps)[3] = epoch;
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
  // If the call has failed, rail_wait goes on without its sums.
  for (int part = 0; part <= params.num_parts; ++part) atomicExch(&params.part_sums[part], ~0u);
  count_steps(params);
}

// One warp, behind the transfer of a late part: tells all ranks of the node.
extern "C" __global__ void __launch_bounds__(32)
    rail_ready(const __grid_constant__ RailParams params) {
  signal_parts(params.world, params.part + 1);
  if (threadIdx.x == 0) count_steps(params);
}

// One thread, in front of the transfer of a late part's results, or of rail_add: waits for them, so
// that the transfer before ends first.
extern "C" __global__ void __launch_bounds__(32)
    rail_wait(const __grid_constant__ RailParams params) {
  if (threadIdx.x != 0) return;
  end_step(params);
  const u32 rows = params.rows_of(params.part);
  const u32* sums = &params.part_sums[params.part];
  wait_until(
      params.world, {kRailPartials, params.world.rank, params.part, -1}, params.world.epoch(), rows,
      [&] { return load_acquire_gpu(sums); }, kLatePatience + 3);
  fence_system();  // NCCL reads what it waits for
  begin_step(params);
}

// One thread: ends a transfer, begins another, or both.
extern "C" __global__ void __launch_bounds__(32)
    rail_step(const __grid_constant__ RailParams params) {
  if (threadIdx.x == 0) count_steps(params);
}

// own: adds the partial sums of all nodes. others, behind their outcomes: if the call has failed on
// any node, or the world has stopped, the results become NaN: then what was returned may be of an
// earlier call.
extern "C" __global__ void __launch_bounds__(kThreads)
    rail_add(const __grid_constant__ RailParams params) {
  __shared__ bool failed;
  if (threadIdx.x == 0) {  // the world may stop between two CTAs' looks
    const bool stopped = params.others && is_stopped(params.world);
    bool any = stopped;
    for (int node = 0; node < params.nodes; ++node) {
      any |= params.others && params.outcomes[node].kind != kCompleted;
    }
    failed = any;
    // In a stopped world the other nodes' outcomes may never have arrived.
    if (stopped) report_stop(params);
  }
  __syncthreads();
  const long long first = first_index(), step = index_step();
  const float nan = __int_as_float(0x7fffffff);
  const bool writes = failed || params.own;
  const long long vectors = 1ll * params.num_tokens * params.hidden / 8;
  const float nans[8] = {nan, nan, nan, nan, nan, nan, nan, nan};
  for (long long i = first; writes && params.out != nullptr && i < vectors; i += step) {
    if (failed) {
      store_row(params.out + 8 * i, nans);
    } else {
      add_vector(params, i);
    }
  }
  const long long pairs = 1ll * params.num_tokens * params.topk;
  for (long long i = first; writes && params.out_dweight != nullptr && i < pairs; i += step) {
    params.out_dweight[i] = failed ? nan : add_dweight(params, i);
  }
  if (first != 0 || !params.others) return;
  const bool failed_here = params.outcomes[params.node].kind != kCompleted;
  for (int slice = 0; failed_here && slice < params.num_epochs; ++slice) *params.epochs[slice] = 0;
  report_other_node(params);
  count_steps(params);
}
