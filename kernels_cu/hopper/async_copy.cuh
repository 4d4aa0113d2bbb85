// Copies of a few bytes from global to shared memory that a thread waits for later.
#pragma once

#include "hopper/mbarrier.cuh"

namespace cometrt {

// 16 bytes, or 16 zeros: then nothing is read.
__device__ inline void copy_async_16(void* shared, const void* global, bool exists) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(global), "r"(exists ? 16 : 0)
               : "memory");
}

__device__ inline void copy_async_4(void* shared, const void* global, bool exists) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(shared)),
               "l"(global), "r"(exists ? 4 : 0)
               : "memory");
}

// Copies of this thread since the last commit form a group.
__device__ inline void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// At most kPending groups of this thread are not there yet, for itself. A barrier then shows the
// others to other threads.
template <int kPending>
__device__ inline void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace cometrt
