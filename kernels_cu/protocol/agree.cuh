// The start of an exchange on the receiving side: wait until every rank has published, then check
// that all make the same call. Used by `await_sources` and `prepare`, or `prepare_small` (a plan, a
// forward), by `prepare_planned` (a forward with a plan), and by `agree` or `prepare_backward`
// (backward). Since every exchange waits for all ranks, ranks are at most one epoch apart.
#pragma once

#include "protocol/exchange_params.cuh"
#include "protocol/wait.cuh"

namespace cometrt {

constexpr u64 kLeastWaitNs = 1000;  // shorter ones are the time of a load

// By one thread: waits for source s in an epoch and returns its number of tokens. 0 if the number
// cannot belong to this layer: all_agree() then finds the mismatch. -1 if the world has stopped.
// Acquires source_ready at system scope; its partner is begin_exchange() of publish.cu.
__device__ inline int wait_source(const ExchangeParams& params, u64 epoch, int s) {
  const u64* flag = &params.world.own().source_ready[s];
  const auto measure = [&](u64 begin_ns) {
    const u64 waited_ns = global_timer_ns() - begin_ns;
    if (waited_ns >= kLeastWaitNs) atomicMax(&params.state->waited_ns, waited_ns);
  };
  const bool ok = wait_until(
      params.world, {kSourceReady, s, -1, -1}, epoch, epoch, [&] { return acquire(flag); }, 1,
      measure);
  const long long found = params.world.own().header[epoch & 1][s].num_tokens;
  if (!ok) return -1;
  return found >= 0 && found <= params.g.max_tokens ? static_cast<int>(found) : 0;
}

// By a warp behind a barrier with the threads that waited for the sources: whether all ranks make
// the same call and the world still runs. A mismatch stops the world. A lane a source, and
// comparisons without branches, so that all loads overlap.
__device__ inline bool all_agree(const ExchangeParams& params, u64 epoch) {
  const Header* headers = params.world.own().header[epoch & 1];
  const Header mine = headers[params.world.rank];
  const bool stopped = __any_sync(~0u, is_stopped(params.world));
  long long different = 0;
  for (int s = threadIdx.x % 32; s < params.world.size; s += 32) {
    const Header other = headers[s];
    different |= (other.epoch ^ mine.epoch) | (other.operation ^ mine.operation) |
                 (other.layer ^ mine.layer) | (other.spec_hash ^ mine.spec_hash) |
                 (other.forward_epoch ^ mine.forward_epoch);
  }
  const bool same = __all_sync(~0u, different == 0);
  if (!same && !stopped && threadIdx.x % 32 == 0) {
    stop_world(params.world, kMismatch, {kSourceReady, -1, -1, -1}, mine.epoch, 0, 0);
  }
  return same && !stopped;
}

// By all threads of a block, in a call that has its plan: waits for all ranks and sets `ok` if all
// make the same call. Acquires source_ready.
__device__ inline void agree_on_call(const ExchangeParams& params) {
  const u64 epoch = params.world.epoch();
  for (int s = threadIdx.x; s < params.world.size; s += blockDim.x) wait_source(params, epoch, s);
  __syncthreads();
  if (threadIdx.x >= 32) return;
  const bool ok = all_agree(params, epoch);
  if (threadIdx.x == 0) params.state->ok = ok;
}

}  // namespace cometrt
