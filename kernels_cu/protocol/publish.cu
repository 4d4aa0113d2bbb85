// The first and the last kernels of an exchange: `publish` puts this rank's inputs into the heap
// and signals source_ready on every rank; `agree` (backward) waits for all ranks; `finish` reports
// a failed call to the host. Instead of `agree`, a plan or a forward has `await_sources` and
// `prepare` (plan/plan.cu), or `prepare_small` alone (plan/plan_small.cu), a forward with a plan
// `prepare_planned` (plan/prepare_planned.cu), and a fused backward `prepare_backward`
// (fused/prepare_backward.cu).
#include "protocol/agree.cuh"

using namespace cometrt;

namespace {

constexpr int kPublishThreads = 512, kThreads = 256;
constexpr int kVectorsAtOnce = 4;  // loads in flight per thread

// By all threads of the grid. `bytes` is a multiple of 16.
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

// `bytes`: a multiple of 16. `to` may be null.
__device__ void fill_bytes(void* to, u64 bytes, u32 word) {
  if (to == nullptr) return;
  const u64 step = static_cast<u64>(gridDim.x) * blockDim.x;
  for (u64 i = blockIdx.x * blockDim.x + threadIdx.x; i < bytes / 16; i += step) {
    static_cast<uint4*>(to)[i] = make_uint4(word, word, word, word);
  }
}

constexpr u32 kInertBlock = 1 << 16;  // added to the ticket by a block that found the call inert

// By a warp: loads what a call's status depends on, then derives the status. The loads overlap.
struct StatusInputs {
  u64 generation, held, aborts[kMaxRanks / 32];  // aborts: of rank 32 * i + lane
  long long forward_epoch;

  __device__ explicit StatusInputs(const ExchangeParams& params) {
    const ControlBlock& own = params.world.own();
    generation = poll(&own.generation);
    held = own.held;
#pragma unroll
    for (int i = 0; i < kMaxRanks / 32; ++i) {
      const int rank = 32 * i + threadIdx.x % 32;
      aborts[i] = rank < params.world.size ? poll(&own.abort[rank]) : 0;
    }
    forward_epoch = params.forward_epoch == nullptr ? 0 : *params.forward_epoch;
  }
  __device__ ExchangeStatus status(const ExchangeParams& params) const {
    bool inert = generation != params.world.generation || held != 0;
#pragma unroll
    for (u64 abort : aborts) inert |= abort >= params.world.generation;
    if (__any_sync(~0u, inert)) return kInert;
    return params.forward_epoch != nullptr && forward_epoch == 0 ? kForwardFailed : kActive;
  }
};

// By one warp, after all blocks have published: a lane a peer writes this rank's header there and
// signals source_ready at system scope. The partner is wait_source(). A call that is not active
// signals nothing and counts no epoch.
__device__ void begin_exchange(const ExchangeParams& params, u64 epoch, ExchangeStatus status) {
  const int me = params.world.rank;
  if (threadIdx.x == 0) {
    params.state->ticket = 0;
    params.state->status = status;
    params.state->ok = 0;
    params.state->reported = 0;
    params.state->waited_ns = params.state->rows_waited_ns = 0;
    if (params.saved_epoch != nullptr) *params.saved_epoch = status == kActive ? epoch : 0;
    if (status == kActive) control_of(params.world, me).epoch = epoch;
  }
  if (status != kActive) return;
  Header header;
  header.epoch = epoch;
  header.operation = params.operation;
  header.layer = params.layer;
  header.spec_hash = params.spec_hash;
  header.forward_epoch = params.forward_epoch == nullptr ? 0 : *params.forward_epoch;
  header.num_tokens = params.num_tokens;
  for (int d = threadIdx.x; d < params.world.size; d += 32) {
    const int peer = (me + d) % params.world.size;
    control_of(params.world, peer).header[epoch & 1][me] = header;
    signal(&control_of(params.world, peer).source_ready[me], epoch);
  }
}

// By one thread: the host reads the report when it sees `kind`.
__device__ void write_report(const ExchangeParams& params, ReportKind kind) {
  volatile ExchangeReport& report = params.report[kind >= kStopped];
  if (report.kind != kNothing) return;  // the first failure stands
  report.epoch = params.world.epoch();
  report.layer = params.layer;
  report.operation = params.operation;
  report.wrong_pair = report.largest_need = 0;
  if (params.progress != nullptr && kind == kWrongRouting) {
    const PlanProgress& plan = *params.progress;
    report.wrong_pair = plan.wrong_pair;
    report.largest_need = plan.largest_need;
    if (plan.wrong_pair != 0) {
      const long long pair = ~plan.wrong_pair, first = pair / params.g.topk * params.g.topk;
      report.wrong_weight = params.all_weights[pair];
      for (int k = 0; k < min(params.g.topk, kMaxTopk); ++k) {
        report.wrong_ids[k] = params.all_ids[first + k];
      }
    }
  }
  fence_host();
  report.kind = kind;
}

// By one thread, once a call. Marks the call as failed for its backward (saved_epoch) and reports
// it. If the world still runs, every rank finds the same failure: `held` then makes later calls
// inert until the host has raised the error.
__device__ void report_failure(const ExchangeParams& params, bool stopped) {
  if (params.saved_epoch != nullptr) *params.saved_epoch = 0;
  ControlBlock& own = control_of(params.world, params.world.rank);
  const u32 status = params.state->status;
  if (stopped) {
    write_report(params, own.generation == params.world.generation ? kStopped : kStaleGraph);
  } else if (status != kInert) {
    own.held = max(own.epoch, 1ull);
    write_report(params, status == kActive ? kWrongRouting : kNoForward);
  }
}

// By a CTA, of a call that has succeeded. A word is one store, and the host looks for words of the
// same epoch: so no fence is needed.
__device__ void write_stats(const ExchangeParams& params) {
  const u32 epoch = static_cast<u32>(params.world.epoch());
  const float waits_us[kNumWaits] = {1e-3f * params.state->waited_ns,
                                     1e-3f * params.state->rows_waited_ns / gridDim.x};
  for (int i = threadIdx.x; i < kNumWaits + params.g.local_experts; i += blockDim.x) {
    const u32 value = i < kNumWaits ? __float_as_uint(i == 0 ? waits_us[0] : waits_us[1])
                                    : params.expert_rows[i - kNumWaits];
    const u64 word = static_cast<u64>(epoch) << 32 | value;
    reinterpret_cast<volatile u64*>(params.stats)[i] = word;
  }
}

// Copies this block's share of the inputs into the heap and zeroes its share of the counters.
__device__ void publish_share(const ExchangeParams& params, u64 epoch) {
  const int me = params.world.rank, first = blockIdx.x * blockDim.x + threadIdx.x;
  const u64 row_bytes = 2ull * params.g.hidden, bytes = params.num_tokens * row_bytes;
  copy_bytes(params.data<char>(me, params.x_offset), params.x, bytes);
  copy_bytes(params.data<char>(me, params.dy_offset), params.dy, bytes);
  if (params.saved_x != nullptr) {
    copy_bytes(static_cast<char*>(params.saved_x), params.x, bytes);
    fill_bytes(static_cast<char*>(params.saved_x) + bytes,
               (params.g.max_tokens - params.num_tokens) * row_bytes, 0);
  }
  const int pairs = params.num_tokens * params.g.topk,
            all_pairs = params.g.max_tokens * params.g.topk;
  const int step = gridDim.x * blockDim.x;
  if (params.ids != nullptr) {
    int* ids = params.routing<int>(me, epoch, params.ids_offset);
    float* weights = params.routing<float>(me, epoch, params.weights_offset);
    for (int i = first; i < pairs; i += step) {
      long long id = params.ids_are_64 ? static_cast<const long long*>(params.ids)[i]
                                       : static_cast<const int*>(params.ids)[i];
      // An id beyond int32 stays out of range; it must not wrap.
      id = max(-2147483648ll, min(2147483647ll, id));
      ids[i] = static_cast<int>(id);
      weights[i] = params.weights[i];
    }
  }
  if (params.dy != nullptr) {
    float* dweight = params.data<float>(me, params.dweight_offset);
    for (int i = first; i < params.g.tp * pairs; i += step) {
      dweight[static_cast<long long>(i / pairs) * all_pairs + i % pairs] = 0;
    }
  }
  for (int i = first; i < params.num_counters; i += step) params.counters[i] = 0;
}

}  // namespace

// wait_for_previous_kernel().
extern "C" __constant__ const int begins_early = 1;

// Copies x, dy, ids and router weights into the heap. The last block to finish begins the exchange,
// so no block waits for another. An inert call writes nothing to the heap: slow peers may still
// read what the call before it published. The call is inert if any warp has seen the world stopped.
// Each block's gpu-scope fences and ticket order its stores before the last block's system-scope
// release of source_ready, which wait_source() acquires.
extern "C" __global__ void __launch_bounds__(kPublishThreads)
    publish(const __grid_constant__ ExchangeParams params) {
  __shared__ u32 before;
  wait_for_previous_kernel();
  let_next_kernel_begin();
  const u64 epoch = params.world.epoch() + 1;
  ExchangeStatus status = StatusInputs(params).status(params);
  if (status == kActive) publish_share(params, epoch);
  const bool inert = __syncthreads_or(status == kInert);
  if (threadIdx.x == 0) {
    fence_acq_rel_gpu();
    before = atomicAdd(&params.state->ticket, inert ? kInertBlock + 1 : 1u);
    fence_acq_rel_gpu();
  }
  __syncthreads();  // orders the ticket's acquire before every lane's release
  if (before % kInertBlock != gridDim.x - 1 || threadIdx.x >= 32) return;
  if (before >= kInertBlock) status = kInert;
  begin_exchange(params, epoch, status);
}

// One CTA, in a backward that is not fused.
extern "C" __global__ void __launch_bounds__(kThreads)
    agree(const __grid_constant__ ExchangeParams params) {
  wait_for_previous_kernel();
  if (params.state->status == kActive) agree_on_call(params);
}

// One warp, in front of `prepare`, whose blocks fill the GPU: waits for all ranks. A peer publishes
// when its host has queued the call. That host may wait for a kernel of another library, such as
// NCCL, that needs room here. So what waits for a peer's host takes no more than one SM.
extern "C" __global__ void __launch_bounds__(32)
    await_sources(const __grid_constant__ ExchangeParams params) {
  wait_for_previous_kernel();
  if (params.state->status != kActive) return;
  const u64 epoch = params.world.epoch();
  for (int s = threadIdx.x; s < params.world.size; s += 32) wait_source(params, epoch, s);
}

// The end of an exchange. If the call failed or was inert, or the world has stopped, the results
// become NaN and the host gets a report. Each block checks by itself, since the world may stop
// meanwhile. The first block that finds a failure reports it. Block 0 tells the host what
// layer.stats() returns.
extern "C" __global__ void __launch_bounds__(kThreads)
    finish(const __grid_constant__ ExchangeParams params) {
  __shared__ bool failed;
  wait_for_previous_kernel();
  let_next_kernel_begin();
  if (threadIdx.x == 0) {
    const bool stopped = is_stopped(params.world);
    failed = !params.state->ok || stopped;
    if (failed && atomicExch(&params.state->reported, 1u) == 0) report_failure(params, stopped);
  }
  __syncthreads();
  if (!failed && blockIdx.x == 0) write_stats(params);
  if (!failed) return;
  const long long first = blockIdx.x * blockDim.x + threadIdx.x, step = gridDim.x * blockDim.x;
  const long long values =
      params.out == nullptr ? 0 : static_cast<long long>(params.num_tokens) * params.g.hidden;
  const __nv_bfloat16 nan = __float2bfloat16(__int_as_float(0x7fffffff));
  for (long long i = first; i < values; i += step) params.out[i] = nan;
  if (params.out_dweight != nullptr) {  // a backward with tokens
    for (long long i = first; i < params.num_tokens * params.g.topk; i += step) {
      params.out_dweight[i] = __int_as_float(0x7fffffff);
    }
  }
  fill_bytes(params.dw_up, params.dw_up_bytes, ~0u);  // NaN in bf16 and in float32
  fill_bytes(params.dw_down, params.dw_down_bytes, ~0u);
}
