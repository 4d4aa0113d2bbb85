// Waits for a flag of another rank or role, used by every kernel that waits for one. Each ends by
// the flag, by a deadline, or because a rank has stopped the world.
#pragma once

#include "protocol/peers.cuh"

namespace cometrt {

// What a thread waits for, as a failure reports it. -1: does not apply.
struct WaitTarget {
  Flag flag;
  int peer, tile, chunk;
};

// Stops the world: signals this rank's failure record and then its abort flag on every rank. Their
// readers are is_stopped() and the hosts. A rank reports one failure a generation. A stale kernel,
// of an older generation than the last reported, reports none. Out of line: a cold path.
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

struct NoMeasure {
  __device__ void operator()(u64) const {}
};

// By one thread: waits until load() >= expected and returns true. `load` acquires; a barrier of the
// warp or CTA passes it on. False if the world has stopped, or if the deadline has passed, which
// stops the world. Then the caller must use nothing that the flag protects. `patience`: the
// deadline in multiples of the world's timeout. `measure` is called at the end of a wait that
// has succeeded, with the time of its begin, unless the flag was there at once.
template <typename Load, typename Measure = NoMeasure>
__device__ inline bool wait_until(const World& world, WaitTarget target, u64 epoch, u64 expected,
                                  Load load, u32 patience = 1, Measure measure = {}) {
  u64 found = load();
  if (found >= expected) return true;
  const u64 deadline = global_timer_ns() + patience * world.timeout_ns;
  for (u32 polls = 1;; ++polls) {
    found = load();
    if (found >= expected) {
      measure(deadline - patience * world.timeout_ns);
      return true;
    }
    __nanosleep(polls < 8 ? 0 : 50);  // saves memory bandwidth
    if (polls % 64 == 0) {
      if (is_stopped(world)) return false;
      if (global_timer_ns() > deadline) {
        stop_world(world, kTimeout, target, epoch, expected, found);
        return false;
      }
    }
  }
}

}  // namespace cometrt
