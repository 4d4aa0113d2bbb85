// Waits that end: by the flag, by a deadline, or because another rank stopped the world.
#pragma once

#include "protocol/peers.cuh"

namespace cometrt {

// What a thread waits for; -1 where tile or N-chunk does not apply.
struct WaitTarget {
  Flag flag;
  int peer, tile, chunk;
};

// Cold. Every rank gets the failure record, then the abort. The first failure of a rank stands;
// those of an older generation come too late.
__device__ __noinline__ void stop_world(const World& world, FailureKind kind, WaitTarget target,
                                        u64 epoch, u64 expected, u64 found) {
  if (atomicMax(&control_of(world, world.rank).reported, world.generation) >= world.generation)
    return;
  for (int peer = 0; peer < world.size; ++peer) {
    FailureRecord& record = control_of(world, peer).failure[world.rank];
    record.kind = kind;
    record.waiter = world.rank;
    record.flag = target.flag;
    record.peer = target.peer;
    record.tile = target.tile;
    record.chunk = target.chunk;
    record.epoch = epoch;
    record.expected = expected;
    record.found = found;
    signal(&record.generation, world.generation);
  }
  for (int peer = 0; peer < world.size; ++peer) {
    signal(&control_of(world, peer).abort[world.rank], world.generation);
  }
}

// True once load() >= expected, acquired if load acquires. False if the wait ended without it: by
// the deadline, `patience` times the world's timeout, or because the world has stopped. Then the
// caller leaves the kernel. One thread waits; a barrier of its CTA or warp follows.
template <typename Load>
__device__ inline bool wait_until(const World& world, WaitTarget target, u64 epoch, u64 expected,
                                  Load load, u32 patience = 1) {
  u64 found = load();
  if (found >= expected) return true;
  const u64 deadline = global_timer_ns() + patience * world.timeout_ns;
  for (u32 polls = 1;; ++polls) {
    found = load();
    if (found >= expected) return true;
    __nanosleep(polls < 8 ? 0 : 50);  // leaves memory bandwidth to others
    if (polls % 64 == 0) {
      if (world.stopped()) return false;
      if (global_timer_ns() > deadline) {
        stop_world(world, kTimeout, target, epoch, expected, found);
        return false;
      }
    }
  }
}

}  // namespace cometrt
