// A virtual link: what crosses ranks on one GPU is released at the rate of a real link.
#pragma once

#include "hopper/memory.cuh"

namespace cometrt {

struct Pace {
  u64* free_at_ns;  // when the link of this rank and direction is free again; null: no pacing
  u64 femtoseconds_per_byte, latency_ns;
};

// Bytes on the link. When they have crossed is left to who asks for it: until then nothing waits
// for the answer of the atomic that put them there.
struct Crossing {
  u64 begin_ns = 0, needs_ns = 0;  // needs 0: nothing is paced

  // Called as they leave. No credit for idle time: a link that was free starts now.
  __device__ void begin(const Pace& pace, u64 bytes) {
    needs_ns = 0;
    if (pace.free_at_ns == nullptr || bytes == 0) return;
    const u64 cost_ns = bytes * pace.femtoseconds_per_byte / 1000000;
    max_relaxed_gpu(pace.free_at_ns, global_timer_ns());
    needs_ns = cost_ns + pace.latency_ns;
    begin_ns = fetch_add_relaxed_gpu(pace.free_at_ns, cost_ns);
  }
  __device__ u64 end_ns() const { return needs_ns != 0 ? begin_ns + needs_ns : 0; }
};

// When the bytes will have crossed; 0 where nothing is paced.
__device__ inline u64 reserve_link(const Pace& pace, u64 bytes) {
  Crossing crossing;
  crossing.begin(pace, bytes);
  return crossing.end_ns();
}

// Between the end of the copy and the release of its flag.
__device__ inline void wait_crossed(u64 crossed_ns) {
  while (crossed_ns > global_timer_ns()) {
  }
}

}  // namespace cometrt
