// PTX wrappers for clusters: barriers, mbarrier arrivals and stores in another CTA's shared memory,
// and multicast loads.
#pragma once

#include "hopper/bulk.cuh"

namespace cometrt {

__device__ inline u32 cluster_cta() {
  u32 rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// By all threads of the cluster. Releases and acquires at cluster scope.
__device__ inline void cluster_barrier() {
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
}

// Arrives on the barrier at the same shared address of CTA `cta`, which may be this one. It has no
// release at cluster scope, which would compile to a fence of the whole GPU. So it protects only
// shared memory that was read, by completed wgmma or into registers, and not written.
__device__ inline void mbarrier_arrive_at(u64* barrier, u32 cta) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(cta)
      : "memory");
}

// As above, and adds `bytes` to what that barrier's phase waits for.
__device__ inline void mbarrier_arrive_expect_at(u64* barrier, u32 cta, u32 bytes) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.expect_tx.shared::cluster.b64 _, [remote], %2;\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(cta), "r"(bytes)
      : "memory");
}

// Stores 16 bytes at the same shared address of CTA `cta`. Completes on that CTA's barrier.
__device__ inline void store_async(void* shared, int4 value, u64* barrier, u32 cta) {
  asm volatile(
      "{\n"
      ".reg .b32 to, remote;\n"
      "mapa.shared::cluster.u32 to, %0, %2;\n"
      "mapa.shared::cluster.u32 remote, %1, %2;\n"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [to], {%3, %4, %5, %6}, "
      "[remote];\n"
      "}\n" ::"r"(shared_address(shared)),
      "r"(shared_address(barrier)), "r"(cta), "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w)
      : "memory");
}

// A box of the tensor map, at the same shared address of every CTA in the bit mask `ctas`.
// Completes on the barrier of each of them.
__device__ inline void tensor_load_4d_multicast(void* shared, const TensorMap* map, int c0, int c1,
                                                int c2, int c3, u64* barrier, u16 ctas,
                                                u64 policy) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".multicast::cluster.L2::cache_hint [%0], [%1, {%3, %4, %5, %6}], [%2], %7, %8;" ::"r"(
          shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "h"(ctas),
      "l"(policy)
      : "memory");
}

}  // namespace cometrt
