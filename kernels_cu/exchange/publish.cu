// The start of an exchange: publish, see all others do so, agree that all call the same.
#include "exchange/agree.cuh"

using namespace cometrt;

namespace {

__device__ void copy_bytes(char* to, const void* from, u64 bytes) {  // a multiple of 16
  if (from == nullptr || from == to) return;
  const u64 step = static_cast<u64>(gridDim.x) * blockDim.x;
  for (u64 i = blockIdx.x * blockDim.x + threadIdx.x; i < bytes / 16; i += step) {
    reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(from)[i];
  }
}

__device__ void zero_bytes(char* to, u64 bytes) {  // a multiple of 16
  const u64 step = static_cast<u64>(gridDim.x) * blockDim.x;
  for (u64 i = blockIdx.x * blockDim.x + threadIdx.x; i < bytes / 16; i += step) {
    reinterpret_cast<uint4*>(to)[i] = make_uint4(0, 0, 0, 0);
  }
}

__device__ void write_report(const Call& c, bool stopped) {
  volatile CallReport& report = *c.report;
  if (report.epoch != 0) return;  // the first one stands
  report.stopped = stopped;
  report.wrong_pair = c.errors == nullptr ? kNoWrongPair : c.errors[0];
  report.largest_need = c.errors == nullptr ? 0 : c.errors[1];
  if (report.wrong_pair != kNoWrongPair) {
    const long long pair = c.errors[0], first = pair / c.g.topk * c.g.topk;
    report.wrong_weight = c.all_weights[pair];
    for (int k = 0; k < c.g.topk; ++k) report.wrong_ids[k] = c.all_ids[first + k];
  }
  __threadfence_system();
  report.epoch = c.world.epoch();
}

}  // namespace

// Puts x, dy, ids and weights into the heap, clears what the call counts up; the last block to
// finish writes this rank's header on every rank and releases source_ready. Acquired by `prepare`
// (forward) and `agree` (backward).
extern "C" __global__ void publish(const __grid_constant__ Call c) {
  const int me = c.world.rank, first = blockIdx.x * blockDim.x + threadIdx.x;
  const u64 epoch = c.world.epoch() + 1, parity = epoch & 1;
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
  for (int i = first; i < c.num_tile_counters; i += step) c.tile_filled[i] = 0;
  __syncthreads();
  if (threadIdx.x != 0) return;
  __threadfence();
  if (atomicAdd(&c.state->ticket, 1u) != gridDim.x - 1) return;
  fence_acq_rel_sys();
  Header header;
  header.epoch = epoch;
  header.operation = c.operation;
  header.layer = c.layer;
  header.spec_hash = c.spec_hash;
  header.forward_epoch = c.forward_epoch == nullptr ? 0 : *c.forward_epoch;
  header.num_tokens = c.num_tokens;
  for (int peer = 0; peer < c.world.size; ++peer) {
    c.world.control[peer]->header[parity][me] = header;
  }
  c.world.control[me]->epoch = epoch;
  if (c.kept_epoch != nullptr) *c.kept_epoch = epoch;
  c.state->ticket = 0;
  c.state->ok = 0;
  c.state->told = 0;
  for (int d = 0; d < c.world.size; ++d) {
    const int peer = (me + d) % c.world.size;
    store_release_sys(&c.world.control[peer]->source_ready[me], epoch);
  }
}

// One block: wait for all ranks, and see whether all call the same. Acquires source_ready.
extern "C" __global__ void agree(const __grid_constant__ Call c) {
  for (int s = threadIdx.x; s < c.world.size; s += blockDim.x) wait_source(c, s);
  __syncthreads();
  if (threadIdx.x == 0) c.state->ok = all_agree(c);
}

// The end of an exchange: results of a call that failed, or of a world that stopped, are NaN, and
// the host is told. A world may stop while some blocks have found that it runs: each decides for
// itself, and the first that writes NaN tells.
extern "C" __global__ void finish(const __grid_constant__ Call c) {
  __shared__ bool failed;
  if (threadIdx.x == 0) {
    const bool stopped = c.world.stopped();
    failed = !c.state->ok || stopped;
    if (failed && atomicExch(&c.state->told, 1u) == 0) write_report(c, stopped);
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
