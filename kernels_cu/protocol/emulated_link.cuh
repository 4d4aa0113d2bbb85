// Link emulation for virtual ranks that share a GPU: a flag is signalled no earlier than a real
// link would have transferred the data behind it. Used by every kernel that moves data between
// ranks. Macro LINK: 1 compiles it in. Without it these functions are empty and production kernels
// contain none of it.
#pragma once

#include "hopper/memory.cuh"

#ifndef LINK
#define LINK 0
#endif

namespace cometrt {

// One direction of a rank's link. Mirrored by emulated_link_dtype in cometrt/kernels/params.py.
struct EmulatedLink {
  u64* free_at_ns;  // when the last transfer so far leaves the link; advanced by relaxed atomics
  u64 femtoseconds_per_byte, latency_ns;
};

#if LINK

// A transfer in flight. end_ns() is computed late, so that no thread waits for the atomic's result
// before it needs it.
struct LinkTransfer {
  u64 begin_ns = 0;
  u32 duration_ns = 0;  // 0: none in flight

  // Queues the bytes behind those on the link. A transfer over an idle link begins now.
  __device__ void begin(const EmulatedLink& link, u64 bytes) {
    duration_ns = 0;
    if (bytes == 0) return;
    const u64 cost_ns = bytes * link.femtoseconds_per_byte / 1000000;
    max_relaxed_gpu(link.free_at_ns, global_timer_ns());
    duration_ns = static_cast<u32>(cost_ns + link.latency_ns);
    begin_ns = fetch_add_relaxed_gpu(link.free_at_ns, cost_ns);
  }
  __device__ u64 end_ns() const { return duration_ns != 0 ? begin_ns + duration_ns : 0; }
};

// Begins a transfer; returns when it ends.
__device__ inline u64 begin_transfer(const EmulatedLink& link, u64 bytes) {
  LinkTransfer transfer;
  transfer.begin(link, bytes);
  return transfer.end_ns();
}

// After a copy and before the signal of its flag.
__device__ inline void wait_transferred(u64 transferred_ns) {
  while (transferred_ns > global_timer_ns()) {
  }
}

// For use by a single lane: see opaque_pointer.
__device__ inline EmulatedLink opaque_link(EmulatedLink link) {
  link.free_at_ns = opaque_pointer(link.free_at_ns);
  return link;
}

#else

struct LinkTransfer {
  __device__ void begin(const EmulatedLink&, u64) {}
  __device__ static constexpr u64 end_ns() { return 0; }
};

__device__ inline constexpr u64 begin_transfer(const EmulatedLink&, u64) { return 0; }
__device__ inline void wait_transferred(u64) {}
__device__ inline EmulatedLink opaque_link(const EmulatedLink&) { return {}; }

#endif

}  // namespace cometrt
