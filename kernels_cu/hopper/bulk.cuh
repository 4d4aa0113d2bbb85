// PTX wrappers for bulk copies (TMA): contiguous bytes between global and shared memory, and boxes
// of a tensor map. Loads complete on an mbarrier, stores in a bulk group.
#pragma once

#include "hopper/mbarrier.cuh"

namespace cometrt {

struct alignas(128) TensorMap {  // CUtensorMap, encoded on the host
  u64 opaque[16];
};

// L2 eviction priority of what a copy reads or writes.
enum class CacheHint { kEvictNormal, kEvictLast, kEvictFirst };

template <CacheHint kHint>
__device__ inline u64 cache_policy() {
  u64 policy;
  if (kHint == CacheHint::kEvictNormal) {
    asm volatile("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
  } else if (kHint == CacheHint::kEvictLast) {
    asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  } else {
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  }
  return policy;
}

// Global to shared. Completes on the mbarrier. Addresses and `bytes` are multiples of 16.
template <CacheHint kHint = CacheHint::kEvictNormal>
__device__ inline void bulk_load(void* shared, const void* global, u32 bytes, u64* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1], %2, [%3], %4;" ::"r"(shared_address(shared)),
      "l"(global), "r"(bytes), "r"(shared_address(barrier)), "l"(cache_policy<kHint>())
      : "memory");
}

// Shared to global. Completes in this thread's next bulk group.
template <CacheHint kHint = CacheHint::kEvictNormal>
__device__ inline void bulk_store(void* global, const void* shared, u32 bytes) {
  asm volatile(
      "cp.async.bulk.global.shared::cta.bulk_group.L2::cache_hint [%0], [%1], %2, %3;" ::"l"(
          global),
      "r"(shared_address(shared)), "r"(bytes), "l"(cache_policy<kHint>())
      : "memory");
}

__device__ inline void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Until at most kPending of this thread's groups still read shared memory. Stages of older groups
// may be refilled then.
template <int kPending>
__device__ inline void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// Until at most kPending of this thread's groups are incomplete. What older groups wrote may be
// signalled then.
template <int kPending>
__device__ inline void bulk_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}

// A box of the tensor map into this CTA's shared memory. Coordinates are innermost first.
__device__ inline void tensor_load_4d(void* shared, const TensorMap* map, int c0, int c1, int c2,
                                      int c3, u64* barrier, u64 policy) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".L2::cache_hint [%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "l"(policy)
      : "memory");
}

// Brings a box of the tensor map to L2. Nothing waits for it.
__device__ inline void tensor_prefetch_4d(const TensorMap* map, int c0, int c1, int c2, int c3,
                                          u64 policy) {
  asm volatile(
      "cp.async.bulk.prefetch.tensor.4d.L2.global.tile.L2::cache_hint [%0, {%1, %2, %3, %4}], "
      "%5;" ::"l"(map),
      "r"(c0), "r"(c1), "r"(c2), "r"(c3), "l"(policy)
      : "memory");
}

// A box of this CTA's shared memory into that of the tensor map: elements beyond the map's bounds
// are left out. Completes in this thread's next bulk group. Lines are evicted first.
__device__ inline void tensor_store_4d(const TensorMap* map, const void* shared, int c0, int c1,
                                       int c2, int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group.L2::cache_hint "
      "[%0, {%2, %3, %4, %5}], [%1], %6;" ::"l"(map),
      "r"(shared_address(shared)), "r"(c0), "r"(c1), "r"(c2), "r"(c3),
      "l"(cache_policy<CacheHint::kEvictFirst>())
      : "memory");
}

// By each thread that wrote shared memory, before a barrier and a bulk copy that reads it.
__device__ inline void fence_proxy_async_shared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

}  // namespace cometrt
