// Every exchange waits for all ranks, so that ranks are at most one exchange apart. It goes on only
// if all ranks make the same call.
#pragma once

#include "protocol/exchange_params.cuh"
#include "protocol/wait.cuh"

namespace cometrt {

// The number of source s's tokens, once it has published; 0 if its call is of another layer. -1 if
// the wait ended without it: the world has stopped. One thread. Acquires source_ready.
__device__ inline int wait_source(const ExchangeParams& params, int s) {
  const u64 epoch = params.world.epoch();
  const u64* flag = &params.world.own().source_ready[s];
  const bool ok = wait_until(params.world, {kSourceReady, s, -1, -1}, epoch, epoch,
                             [&] { return acquire(flag); });
  const long long found = params.world.own().header[epoch & 1][s].num_tokens;
  if (!ok) return -1;
  return found >= 0 && found <= params.g.max_tokens ? static_cast<int>(found) : 0;
}

// One thread, after all sources: whether all ranks make the same call and the world still runs. A
// rank that finds a mismatch stops the world.
__device__ inline bool all_agree(const ExchangeParams& params) {
  const Header* headers = params.world.own().header[params.world.epoch() & 1];
  const Header mine = headers[params.world.rank];
  const bool stopped = params.world.stopped();
  bool same = true;
  for (int s = 0; s < params.world.size; ++s) {
    const Header& other = headers[s];
    same &= other.epoch == mine.epoch && other.operation == mine.operation &&
            other.layer == mine.layer && other.spec_hash == mine.spec_hash &&
            other.forward_epoch == mine.forward_epoch;
  }
  if (!same && !stopped) {
    stop_world(params.world, kMismatch, {kSourceReady, -1, -1, -1}, mine.epoch, 0, 0);
  }
  return same && !stopped;
}

}  // namespace cometrt
