// The start of an exchange: publish, see all others do so, agree that all call the same.
#include "comm/wait.cuh"
#include "exchange/call.cuh"

using namespace cometrt;

namespace {

__device__ void copy_bytes(char* to, const void* from, u64 bytes) {  // a multiple of 16
  if (from == nullptr || from == to) return;
  const u64 step = static_cast<u64>(gridDim.x) * blockDim.x;
  for (u64 i = blockIdx.x * blockDim.x + threadIdx.x; i < bytes / 16; i += step) {
    reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(from)[i];
  }
}

}  // namespace

// Puts x, dy, ids and weights into the heap, clears dweight; the last block to finish writes this
// rank's header on every rank and releases source_ready. Acquired by `gather`.
extern "C" __global__ void publish(const __grid_constant__ Call c) {
  const int me = c.world.rank, first = blockIdx.x * blockDim.x + threadIdx.x;
  const u64 epoch = c.world.epoch() + 1, parity = epoch & 1;
  const u64 row_bytes = 2ull * c.g.hidden;
  copy_bytes(c.data<char>(me, c.x_at), c.x, c.num_tokens * row_bytes);
  copy_bytes(c.data<char>(me, c.dy_at), c.dy, c.num_tokens * row_bytes);
  const int pairs = c.num_tokens * c.g.topk, all_pairs = c.g.max_tokens * c.g.topk;
  const int step = gridDim.x * blockDim.x;
  if (c.ids != nullptr) {
    int* ids = c.data<int>(me, c.ids_at) + parity * all_pairs;
    float* weights = c.data<float>(me, c.weights_at) + parity * all_pairs;
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
  c.state->epoch = epoch;
  c.state->ticket = 0;
  for (int d = 0; d < c.world.size; ++d) {
    const int peer = (me + d) % c.world.size;
    store_release_sys(&c.world.control[peer]->source_ready[me], epoch);
  }
}

// Block s waits for source s and takes its tables. Acquires source_ready.
extern "C" __global__ void gather(const __grid_constant__ Call c) {
  __shared__ int tokens;
  const int s = blockIdx.x;
  const u64 epoch = c.world.epoch(), parity = epoch & 1;
  if (threadIdx.x == 0) {
    const u64* flag = &c.world.own().source_ready[s];
    const bool ok = wait_until(c.world, {kSourceReady, s, -1, -1}, epoch, epoch,
                               [&] { return load_acquire_sys(flag); });
    const long long found = c.world.own().header[parity][s].num_tokens;
    const bool sane = ok && found >= 0 && found <= c.g.max_tokens;
    tokens = sane ? static_cast<int>(found) : 0;
    if (c.all_num_tokens != nullptr) c.all_num_tokens[s] = tokens;
  }
  __syncthreads();
  if (c.all_ids == nullptr) return;
  const int all_pairs = c.g.max_tokens * c.g.topk;
  const int* ids = c.data<int>(s, c.ids_at) + parity * all_pairs;
  const float* weights = c.data<float>(s, c.weights_at) + parity * all_pairs;
  for (int i = threadIdx.x; i < tokens * c.g.topk; i += blockDim.x) {
    c.all_ids[static_cast<long long>(s) * all_pairs + i] = ids[i];
    c.all_weights[static_cast<long long>(s) * all_pairs + i] = weights[i];
  }
}

// One thread: do all ranks call the same, and has the planner found nothing wrong?
extern "C" __global__ void verdict(const __grid_constant__ Call c) {
  const u64 parity = c.world.epoch() & 1;
  bool same = true;
  const Header mine = c.world.own().header[parity][c.world.rank];
  const bool stopped = c.world.stopped();
  for (int s = 0; s < c.world.size; ++s) {
    const Header& other = c.world.own().header[parity][s];
    same &= other.epoch == mine.epoch && other.operation == mine.operation &&
            other.layer == mine.layer && other.spec_hash == mine.spec_hash &&
            other.forward_epoch == mine.forward_epoch;
  }
  if (!same && !stopped) {
    stop_world(c.world, kMismatch, {kSourceReady, -1, -1, -1}, mine.epoch, 0, 0);
  }
  const bool planned = c.errors == nullptr || (c.errors[0] == ~0ull && c.errors[1] == 0);
  c.state->ok = same && !stopped && planned;
}

// The end of an exchange: results of a call that failed, or of a world that stopped, are NaN.
extern "C" __global__ void poison(const __grid_constant__ Call c) {
  if (c.state->ok && !c.world.stopped()) return;
  const long long first = blockIdx.x * blockDim.x + threadIdx.x, step = gridDim.x * blockDim.x;
  const long long values = static_cast<long long>(c.num_tokens) * c.g.hidden;
  const __nv_bfloat16 nan = __float2bfloat16(__int_as_float(0x7fffffff));
  for (long long i = first; i < values; i += step) c.out[i] = nan;
  if (c.out_dweight == nullptr) return;
  for (long long i = first; i < c.num_tokens * c.g.topk; i += step) {
    c.out_dweight[i] = __int_as_float(0x7fffffff);
  }
}
