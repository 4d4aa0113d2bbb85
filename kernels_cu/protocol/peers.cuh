// The only code that addresses another rank's memory and that synchronises at system scope, with
// other ranks or with the host. Addresses are this rank's mapping of memory that the peer
// allocated, so accesses cross the link. A second transport would replace this file.
#pragma once

#include "protocol/control_block.cuh"

namespace cometrt {

// A rank's rows: x, dy, staging rows, dweight.
template <typename T>
__device__ inline T* rows_of(const World& world, int rank, u64 offset) {
  return reinterpret_cast<T*>(world.data[rank] + offset);
}

// A rank's ids or router weights of an epoch. Each epoch parity has its own region.
template <typename T>
__device__ inline T* routing_of(const World& world, int rank, u64 epoch, u64 offset) {
  return reinterpret_cast<T*>(world.routing[epoch & 1][rank] + offset);
}

// A rank's partials_ready flags.
__device__ inline u64* flags_of(const World& world, int rank, u64 offset) {
  return reinterpret_cast<u64*>(world.flags[rank] + offset);
}

__device__ inline ControlBlock& control_of(const World& world, int rank) {
  return *world.control[rank];
}

// Sets a flag on any rank: a release at system scope. What this thread did before it, and what it
// observed through barriers and fence_system(), is visible to a thread that acquires the value. A
// flag has one writer and only grows.
__device__ inline void signal(u64* flag, u64 value) { store_release_sys(flag, value); }

// Reads a flag in this rank's or the host's memory: an acquire at system scope.
__device__ inline u64 acquire(const u64* flag) { return load_acquire_sys(flag); }

// Reads such a flag without order. fence_system() after it makes it an acquire.
__device__ inline u64 poll(const u64* flag) { return load_relaxed_sys(flag); }

// Orders this thread's accesses for all ranks: before signal(), what other threads of the block
// wrote and a barrier ordered before; after poll(), what the flag protects.
__device__ inline void fence_system() { fence_acq_rel_sys(); }

// Before a plain store that the host reads: what it protects is visible to the host first.
__device__ inline void fence_host() { __threadfence_system(); }

// Whether a rank has stopped the world, or this rank has been reset since the launch. Acquires the
// failure records; the partners are the signals of stop_world(), or the host's copies.
__device__ inline bool is_stopped(const World& world) {
  const ControlBlock& own = world.own();
  bool any = poll(&own.generation) != world.generation;
  for (int r = 0; r < world.size; ++r) any |= poll(&own.abort[r]) >= world.generation;
  if (any) fence_system();
  return any;
}

}  // namespace cometrt
