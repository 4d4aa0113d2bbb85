// The emulated link: between virtual ranks of one GPU, a flag is signalled when a real link would
// have transferred what it protects. Only where LINK is 1: else nothing of it is in the machine
// code.
#pragma once

#include "hopper/memory.cuh"

#ifndef LINK
#define LINK 0
#endif

namespace cometrt {

// Mirrored by pace_dtype in cometrt/kernels/params.py. Not read where LINK is 0.
struct EmulatedLink {
  u64* free_at_ns;  // when the link of this rank and direction is free again
  u64 femtoseconds_per_byte, latency_ns;
};

#if LINK

// Bytes under way. The end is computed where it is needed: until then no thread waits for the
// atomic's answer.
struct LinkTransfer {
  u64 begin_ns = 0, needs_ns = 0;  // needs_ns 0: nothing is under way

  // When the bytes leave. Idle time earns no credit: a transfer over a free link begins now.
  __device__ void begin(const EmulatedLink& link, u64 bytes) {
    needs_ns = 0;
    if (bytes == 0) return;
    const u64 cost_ns = bytes * link.femtoseconds_per_byte / 1000000;
    max_relaxed_gpu(link.free_at_ns, global_timer_ns());
    needs_ns = cost_ns + link.latency_ns;
    begin_ns = fetch_add_relaxed_gpu(link.free_at_ns, cost_ns);
  }
  __device__ u64 end_ns() const { return needs_ns != 0 ? begin_ns + needs_ns : 0; }
};

// When the bytes will have been transferred.
__device__ inline u64 begin_transfer(const EmulatedLink& link, u64 bytes) {
  LinkTransfer transfer;
  transfer.begin(link, bytes);
  return transfer.end_ns();
}

// After the copy, before the signal of its flag.
__device__ inline void wait_transferred(u64 transferred_ns) {
  while (transferred_ns > global_timer_ns()) {
  }
}

// The link for one lane alone; see own_pointer.
__device__ inline EmulatedLink own_link(EmulatedLink link) {
  link.free_at_ns = own_pointer(link.free_at_ns);
  return link;
}

#else

struct LinkTransfer {
  __device__ void begin(const EmulatedLink&, u64) {}
  __device__ static constexpr u64 end_ns() { return 0; }
};

__device__ inline constexpr u64 begin_transfer(const EmulatedLink&, u64) { return 0; }
__device__ inline void wait_transferred(u64) {}
__device__ inline EmulatedLink own_link(const EmulatedLink&) { return {}; }

#endif

}  // namespace cometrt
