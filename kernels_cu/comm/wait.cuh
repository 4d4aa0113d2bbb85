// Waits that end: by the flag, by a deadline, or because another rank stopped the world.
#pragma once

#include "comm/world.cuh"

namespace cometrt {

// What is waited for; -1 where tile or chunk does not apply.
struct Wanted {
  Flag flag;
  int peer, tile, chunk;
};

// Cold: every rank gets the record, then the abort. The first failure of a rank stands, and those
// of an older generation come too late.
__device__ __noinline__ void stop_world(const World& world, FailureKind kind, Wanted wanted,
                                        u64 epoch, u64 expected, u64 found) {
  if (atomicMax(&world.control[world.rank]->reported, world.generation) >= world.generation) return;
  for (int peer = 0; peer < world.size; ++peer) {
    FailureRecord& record = world.control[peer]->failure[world.rank];
    record.kind = kind;
    record.waiter = world.rank;
    record.flag = wanted.flag;
    record.peer = wanted.peer;
    record.tile = wanted.tile;
    record.chunk = wanted.chunk;
    record.epoch = epoch;
    record.expected = expected;
    record.found = found;
    store_release_sys(&record.generation, world.generation);
  }
  for (int peer = 0; peer < world.size; ++peer) {
    store_release_sys(&world.control[peer]->abort[world.rank], world.generation);
  }
}

// True once load() >= expected, acquired if load acquires; false if the wait ended without it:
// then the caller leaves the kernel. One thread waits, then a barrier for its peers. `patience`:
// times the world's timeout.
template <typename Load>
__device__ inline bool wait_until(const World& world, Wanted wanted, u64 epoch, u64 expected,
                                  Load load, u32 patience = 1) {
  u64 found = load();
  if (found >= expected) return true;
  const u64 deadline = global_timer_ns() + patience * world.timeout_ns;
  for (u32 polls = 1;; ++polls) {
    found = load();
    if (found >= expected) return true;
    __nanosleep(polls < 8 ? 0 : 50);  // leaves the memory to those who work
    if (polls % 64 == 0) {
      if (world.stopped()) return false;
      if (global_timer_ns() > deadline) {
        stop_world(world, kTimeout, wanted, epoch, expected, found);
        return false;
      }
    }
  }
}

}  // namespace cometrt
