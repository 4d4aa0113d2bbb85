// PTX wrappers for mbarriers: barriers in shared memory that count arrivals and bytes of copies. A
// phase ends when both counts are reached; waits name the phase by its parity.
#pragma once

#include "hopper/memory.cuh"

namespace cometrt {

__device__ inline u32 shared_address(const void* pointer) {
  return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

__device__ inline void mbarrier_init(u64* barrier, u32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}

// By the thread that initialised barriers: makes them visible to the async proxy and the cluster. A
// barrier of the CTA or cluster must follow for the other threads.
__device__ inline void mbarrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ inline void mbarrier_arrive(u64* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}

// Arrives, and adds `bytes` to what this phase waits for.
__device__ inline void mbarrier_arrive_expect(u64* barrier, u32 bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}

__device__ inline bool mbarrier_test(u64* barrier, u32 parity) {
  u32 done;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}\n"
      : "=r"(done)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
  return done;
}

// Until the phase of that parity has ended. It has no deadline: use it only for barriers that
// threads and copies of this cluster complete.
__device__ inline void mbarrier_wait(u64* barrier, u32 parity) {
  while (!mbarrier_test(barrier, parity)) {
  }
}

}  // namespace cometrt
