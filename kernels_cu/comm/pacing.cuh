// A virtual link: what crosses ranks on one GPU is released at the rate of a real link.
#pragma once

#include "hopper/memory.cuh"

namespace cometrt {

struct Pace {
  u64* free_at_ns;       // when the link of this rank and direction is free again; null: no pacing
  u64 picoseconds_per_byte;
};

// Reserves the link for `bytes` and returns when they have crossed it. No credit for idle time.
__device__ inline u64 reserve_link(const Pace& pace, u64 bytes) {
  const u64 cost_ns = bytes * pace.picoseconds_per_byte / 1000;
  u64 seen = *reinterpret_cast<volatile u64*>(pace.free_at_ns);
  while (true) {
    const u64 now = global_timer_ns();
    const u64 free_at = (seen > now ? seen : now) + cost_ns;
    const u64 before = atomicCAS(pace.free_at_ns, seen, free_at);
    if (before == seen) return free_at;
    seen = before;
  }
}

// One thread, between the end of the copy and the release of its flag.
__device__ inline void pace(const Pace& pace, u64 bytes) {
  if (pace.free_at_ns == nullptr) return;
  const u64 free_at = reserve_link(pace, bytes);
  while (global_timer_ns() < free_at) {
  }
}

}  // namespace cometrt
