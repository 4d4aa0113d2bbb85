// Every exchange waits for all ranks, so that ranks are at most one apart, and goes on only if all
// have called the same.
#pragma once

#include "comm/wait.cuh"
#include "exchange/call.cuh"

namespace cometrt {

// The tokens of source s, once it has published (0 if its layer is another); -1 if the wait ended
// without it: the world has stopped. One thread. Acquires source_ready.
__device__ inline int wait_source(const Call& c, int s) {
  const u64 epoch = c.world.epoch();
  const u64* flag = &c.world.own().source_ready[s];
  const bool ok = wait_until(c.world, {kSourceReady, s, -1, -1}, epoch, epoch,
                             [&] { return load_acquire_sys(flag); });
  const long long found = c.world.own().header[epoch & 1][s].num_tokens;
  if (!ok) return -1;
  return found >= 0 && found <= c.g.max_tokens ? static_cast<int>(found) : 0;
}

// One thread, after all sources: do all ranks call the same, and does the world still run? Who
// finds that they do not stops the world.
__device__ inline bool all_agree(const Call& c) {
  const Header* headers = c.world.own().header[c.world.epoch() & 1];
  const Header mine = headers[c.world.rank];
  const bool stopped = c.world.stopped();
  bool same = true;
  for (int s = 0; s < c.world.size; ++s) {
    const Header& other = headers[s];
    same &= other.epoch == mine.epoch && other.operation == mine.operation &&
            other.layer == mine.layer && other.spec_hash == mine.spec_hash &&
            other.forward_epoch == mine.forward_epoch;
  }
  if (!same && !stopped) {
    stop_world(c.world, kMismatch, {kSourceReady, -1, -1, -1}, mine.epoch, 0, 0);
  }
  return same && !stopped;
}

}  // namespace cometrt
