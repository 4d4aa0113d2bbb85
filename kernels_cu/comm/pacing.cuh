// A virtual link: what crosses ranks on one GPU is released at the rate of a real link.
#pragma once

#include "hopper/memory.cuh"

namespace cometrt {

struct Pace {
  u64* free_at_ns;  // when the link of this rank and direction is free again; null: no pacing
  u64 femtoseconds_per_byte, latency_ns;
};

// When the bytes will have crossed; called as they leave. 0 where nothing is paced. No credit
// for idle time: a link that was free starts now.
__device__ inline u64 reserve_link(const Pace& pace, u64 bytes) {
  if (pace.free_at_ns == nullptr || bytes == 0) return 0;
  const u64 cost_ns = bytes * pace.femtoseconds_per_byte / 1000000;
  atomicMax(pace.free_at_ns, global_timer_ns());
  return atomicAdd(pace.free_at_ns, cost_ns) + cost_ns + pace.latency_ns;
}

// Between the end of the copy and the release of its flag.
__device__ inline void wait_crossed(u64 crossed_ns) {
  while (crossed_ns > global_timer_ns()) {
  }
}

}  // namespace cometrt
