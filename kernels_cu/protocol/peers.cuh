// The one way to another rank's memory, and the signals between ranks. Addresses are this rank's
// view of memory that the peer has allocated; accesses cross the link. Another transport would
// begin here.
#pragma once

#include "protocol/control_block.cuh"

namespace cometrt {

// A rank's rows: x, dy, staging rows, dweight.
template <typename T>
__device__ inline T* rows_of(const World& world, int rank, u64 offset) {
  return reinterpret_cast<T*>(world.data[rank] + offset);
}

// A rank's ids or router weights of an epoch: each parity has its region.
template <typename T>
__device__ inline T* routing_of(const World& world, int rank, u64 epoch, u64 offset) {
  return reinterpret_cast<T*>(world.routing[epoch & 1][rank] + offset);
}

__device__ inline u64* flags_of(const World& world, int rank, u64 offset) {
  return reinterpret_cast<u64*>(world.flags[rank] + offset);
}

__device__ inline ControlBlock& control_of(const World& world, int rank) {
  return *world.control[rank];
}

// A flag on any rank: all that happens before is visible to a thread that acquires the value. It
// only grows, and has one writer.
__device__ inline void signal(u64* flag, u64 value) { store_release_sys(flag, value); }

// A flag on this rank.
__device__ inline u64 acquire(const u64* flag) { return load_acquire_sys(flag); }

}  // namespace cometrt
