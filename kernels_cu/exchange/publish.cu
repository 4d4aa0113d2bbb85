// The start of an exchange: publish, see all others do so, agree that all call the same. And its
// end.
#include "exchange/agree.cuh"
#include "plan/plan.cuh"

using namespace cometrt;

namespace {

constexpr int kVectorsAtOnce = 4;  // loads that are on their way together

// By all threads of the grid; a multiple of 16 bytes.
__device__ void copy_bytes(char* to, const void* from, u64 bytes) {
  if (from == nullptr || from == to) return;
  const u64 step = static_cast<u64>(gridDim.x) * blockDim.x, count = bytes / 16;
  const uint4* source = static_cast<const uint4*>(from);
  uint4* target = reinterpret_cast<uint4*>(to);
  u64 i = blockIdx.x * blockDim.x + threadIdx.x;
  for (; i + (kVectorsAtOnce - 1) * step < count; i += kVectorsAtOnce * step) {
    uint4 values[kVectorsAtOnce];
#pragma unroll
    for (int j = 0; j < kVectorsAtOnce; ++j) values[j] = source[i + j * step];
#pragma unroll
    for (int j = 0; j < kVectorsAtOnce; ++j) target[i + j * step] = values[j];
  }
  for (; i < count; i += step) target[i] = source[i];
}

__device__ void zero_bytes(char* to, u64 bytes) {  // a multiple of 16
  const u64 step = static_cast<u64>(gridDim.x) * blockDim.x;
  for (u64 i = blockIdx.x * blockDim.x + threadIdx.x; i < bytes / 16; i += step) {
    reinterpret_cast<uint4*>(to)[i] = make_uint4(0, 0, 0, 0);
  }
}

constexpr u32 kInertBlock = 1 << 16;  // in a ticket

// What a call's status follows from, as a warp has read it.
struct Standing {
  u64 generation, held, aborts[kMaxRanks / 32];  // a lane each
  long long forward_epoch;

  __device__ explicit Standing(const Call& c) {
    const Control& own = c.world.own();
    generation = load_relaxed_sys(&own.generation);
    held = own.held;
#pragma unroll
    for (int i = 0; i < kMaxRanks / 32; ++i) {
      const int rank = 32 * i + threadIdx.x % 32;
      aborts[i] = rank < c.world.size ? load_relaxed_sys(&own.abort[rank]) : 0;
    }
    forward_epoch = c.forward_epoch == nullptr ? 0 : *c.forward_epoch;
  }
  __device__ CallStatus status(const Call& c) const {
    bool inert = generation != c.world.generation || held != 0;
#pragma unroll
    for (u64 abort : aborts) inert |= abort >= c.world.generation;
    if (__any_sync(~0u, inert)) return kInert;
    return c.forward_epoch != nullptr && forward_epoch == 0 ? kForwardFailed : kActive;
  }
};

// One warp, when all that this rank brings is in place: its header on every rank, then the release
// of source_ready. An inert call releases nothing, and counts no epoch.
__device__ void begin_exchange(const Call& c, u64 epoch, CallStatus status) {
  const int me = c.world.rank;
  if (threadIdx.x == 0) {
    c.state->ticket = 0;
    c.state->status = status;
    c.state->ok = 0;
    c.state->told = 0;
    if (c.kept_epoch != nullptr) *c.kept_epoch = status == kActive ? epoch : 0;
    if (status == kActive) c.world.control[me]->epoch = epoch;
  }
  if (status != kActive) return;
  Header header;
  header.epoch = epoch;
  header.operation = c.operation;
  header.layer = c.layer;
  header.spec_hash = c.spec_hash;
  header.forward_epoch = c.forward_epoch == nullptr ? 0 : *c.forward_epoch;
  header.num_tokens = c.num_tokens;
  for (int d = threadIdx.x; d < c.world.size; d += 32) {
    const int peer = (me + d) % c.world.size;
    c.world.control[peer]->header[epoch & 1][me] = header;
    store_release_sys(&c.world.control[peer]->source_ready[me], epoch);
  }
}

__device__ void write_report(const Call& c, ReportKind kind) {
  volatile CallReport& report = c.report[kind >= kStopped];
  if (report.kind != kNothing) return;  // the first one stands
  report.epoch = c.world.epoch();
  report.layer = c.layer;
  report.operation = c.operation;
  report.wrong_pair = report.largest_need = 0;
  if (c.progress != nullptr && kind == kWrongRouting) {
    const PlanProgress& plan = *c.progress;
    report.wrong_pair = plan.wrong_pair;
    report.largest_need = plan.largest_need;
    if (plan.wrong_pair != 0) {
      const long long pair = ~plan.wrong_pair, first = pair / c.g.topk * c.g.topk;
      report.wrong_weight = c.all_weights[pair];
      for (int k = 0; k < min(c.g.topk, kMostReportedIds); ++k) {
        report.wrong_ids[k] = c.all_ids[first + k];
      }
    }
  }
  __threadfence_system();
  report.kind = kind;
}

// One thread, once a call. Later calls know of the failure from here on: this one's backward, and,
// where nothing is stopped, all calls until the host has raised the error. Every rank finds it.
__device__ void tell_failure(const Call& c, bool stopped) {
  if (c.kept_epoch != nullptr) *c.kept_epoch = 0;
  Control& own = *c.world.control[c.world.rank];
  const u32 status = c.state->status;
  if (stopped) {
    write_report(c, own.generation == c.world.generation ? kStopped : kStaleGraph);
  } else if (status != kInert) {
    own.held = max(own.epoch, 1ull);
    write_report(c, status == kActive ? kWrongRouting : kNoForward);
  }
}

// This block's share of what the rank brings, into the heap; clears what the call counts up.
__device__ void publish_share(const Call& c, u64 epoch) {
  const int me = c.world.rank, first = blockIdx.x * blockDim.x + threadIdx.x;
  const u64 row_bytes = 2ull * c.g.hidden, bytes = c.num_tokens * row_bytes;
  copy_bytes(c.data<char>(me, c.x_at), c.x, bytes);
  copy_bytes(c.data<char>(me, c.dy_at), c.dy, bytes);
  if (c.kept_x != nullptr) {
    copy_bytes(static_cast<char*>(c.kept_x), c.x, bytes);
    zero_bytes(static_cast<char*>(c.kept_x) + bytes, (c.g.max_tokens - c.num_tokens) * row_bytes);
  }
  const int pairs = c.num_tokens * c.g.topk, all_pairs = c.g.max_tokens * c.g.topk;
  const int step = gridDim.x * blockDim.x;
  if (c.ids != nullptr) {
    int* ids = c.routing<int>(me, epoch, c.ids_at);
    float* weights = c.routing<float>(me, epoch, c.weights_at);
    for (int i = first; i < pairs; i += step) {
      long long id = c.ids_are_64 ? static_cast<const long long*>(c.ids)[i]
                                  : static_cast<const int*>(c.ids)[i];
      // What int32 cannot hold stays out of range instead of wrapping.
      id = max(-2147483648ll, min(2147483647ll, id));
      ids[i] = static_cast<int>(id);
      weights[i] = c.weights[i];
    }
  }
  if (c.dy != nullptr) {
    float* dweight = c.data<float>(me, c.dweight_at);
    for (int i = first; i < c.g.tp * pairs; i += step) {
      dweight[static_cast<long long>(i / pairs) * all_pairs + i % pairs] = 0;
    }
  }
  for (int i = first; i < c.num_counters; i += step) c.counters[i] = 0;
}

}  // namespace

// Puts x, dy, ids and weights into the heap; the last block to be done begins the exchange. No
// block waits for another. An inert call writes nothing there: peers that go on for a while may
// still read what the last one put. Where the world stops meanwhile, the call is inert if it is so
// for any warp. source_ready is acquired by `prepare` (forward) and `agree` (backward).
extern "C" __global__ void publish(const __grid_constant__ Call c) {
  __shared__ u32 before;
  const u64 epoch = c.world.epoch() + 1;
  CallStatus status = Standing(c).status(c);
  if (status == kActive) publish_share(c, epoch);
  const bool inert = __syncthreads_or(status == kInert);
  if (threadIdx.x == 0) {
    fence_acq_rel_gpu();
    before = atomicAdd(&c.state->ticket, inert ? kInertBlock + 1 : 1u);
    fence_acq_rel_gpu();
  }
  __syncthreads();  // all that all blocks have stored happens before each lane's release
  if (before % kInertBlock != gridDim.x - 1 || threadIdx.x >= 32) return;
  if (before >= kInertBlock) status = kInert;
  begin_exchange(c, epoch, status);
}

// One block: wait for all ranks, and see whether all call the same. Acquires source_ready.
extern "C" __global__ void agree(const __grid_constant__ Call c) {
  if (c.state->status != kActive) return;
  for (int s = threadIdx.x; s < c.world.size; s += blockDim.x) wait_source(c, s);
  __syncthreads();
  if (threadIdx.x == 0) c.state->ok = all_agree(c);
}

// The end of an exchange: results of a call that failed, that was inert, or of a world that
// stopped, are NaN, and the host is told. A world may stop while some blocks have found that it
// runs: each decides for itself, and the first that writes NaN tells.
extern "C" __global__ void finish(const __grid_constant__ Call c) {
  __shared__ bool failed;
  if (threadIdx.x == 0) {
    const bool stopped = c.world.stopped();
    failed = !c.state->ok || stopped;
    if (failed && atomicExch(&c.state->told, 1u) == 0) tell_failure(c, stopped);
  }
  __syncthreads();
  if (!failed) return;
  const long long first = blockIdx.x * blockDim.x + threadIdx.x, step = gridDim.x * blockDim.x;
  const long long values = static_cast<long long>(c.num_tokens) * c.g.hidden;
  const __nv_bfloat16 nan = __float2bfloat16(__int_as_float(0x7fffffff));
  for (long long i = first; i < values; i += step) c.out[i] = nan;
  if (c.out_dweight == nullptr) return;
  for (long long i = first; i < c.num_tokens * c.g.topk; i += step) {
    c.out_dweight[i] = __int_as_float(0x7fffffff);
  }
}
