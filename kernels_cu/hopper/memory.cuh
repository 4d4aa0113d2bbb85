// PTX wrappers for memory order: flag loads and stores with their scope, fences, named barriers and
// the clock. Nothing here knows what a flag means: kernels_cu/README.md lists who waits for what.
#pragma once

namespace cometrt {

using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

__device__ inline u64 global_timer_ns() {
  u64 now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now)::"memory");
  return now;
}

// threadIdx.x, read from the special register at each call. The compiler then keeps no value
// derived from it in a register.
__device__ inline int thread_index() {
  int index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
}

// A kernel of a file that exports `begins_early` may begin before the kernel in front of it on the
// stream has ended. All its threads wait for that end before they touch global memory: then all
// that was written before is visible. So kernels end in their order, too.
__device__ inline void wait_for_previous_kernel() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}

// By one thread of each CTA. The next kernel may begin when all CTAs have come here, or have ended.
// Its CTAs hold room on the SMs while they wait. So no kernel calls this while it may still wait
// for another rank: that rank, or NCCL, may need the room.
__device__ inline void let_next_kernel_begin() {
  asm volatile("griddepcontrol.launch_dependents;");
}

// Flags. Scope gpu: threads of this rank's kernels. Scope sys: other ranks and the host; kernels
// use those only through protocol/peers.cuh.

__device__ inline u32 load_acquire_gpu(const u32* flag) {
  u32 value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
  return value;
}

__device__ inline u64 load_acquire_sys(const u64* flag) {
  u64 value;
  asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(flag) : "memory");
  return value;
}

// Orders nothing alone. A fence after it makes it an acquire.
__device__ inline u64 load_relaxed_sys(const u64* flag) {
  u64 value;
  asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(flag) : "memory");
  return value;
}

__device__ inline void add_release_gpu(u32* flag, u32 value) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}

// A release only together with a fence of this thread before it.
__device__ inline void add_relaxed_gpu(u32* flag, u32 value) {
  asm volatile("red.relaxed.gpu.global.add.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}

// To two neighbours, 8-byte aligned. Rounds to nearest; subnormal results may become 0.
__device__ inline void add_relaxed_gpu(float* pair, float first, float second) {
  asm volatile("red.relaxed.gpu.global.add.v2.f32 [%0], {%1, %2};" ::"l"(pair), "f"(first),
               "f"(second)
               : "memory");
}

__device__ inline u32 fetch_add_relaxed_gpu(u32* counter, u32 value) {
  u32 old;
  asm volatile("atom.relaxed.gpu.global.add.u32 %0, [%1], %2;"
               : "=r"(old)
               : "l"(counter), "r"(value)
               : "memory");
  return old;
}

__device__ inline u64 fetch_add_relaxed_gpu(u64* counter, u64 value) {
  u64 old;
  asm volatile("atom.relaxed.gpu.global.add.u64 %0, [%1], %2;"
               : "=l"(old)
               : "l"(counter), "l"(value)
               : "memory");
  return old;
}

__device__ inline void max_relaxed_gpu(u64* counter, u64 value) {
  asm volatile("red.relaxed.gpu.global.max.u64 [%0], %1;" ::"l"(counter), "l"(value) : "memory");
}

__device__ inline void store_release_sys(u64* flag, u64 value) {
  asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(flag), "l"(value) : "memory");
}

__device__ inline void fence_acq_rel_gpu() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

__device__ inline void fence_acq_rel_sys() { asm volatile("fence.acq_rel.sys;" ::: "memory"); }

// Orders this thread's accesses through the generic proxy before its later ones through the async
// proxy, and the reverse. It stands between an acquire and a TMA load of the protected data, and
// between ordinary stores and a bulk copy that reads them.
__device__ inline void fence_proxy_async() { asm volatile("fence.proxy.async;" ::: "memory"); }

// The same pointer, hidden from the compiler's uniformity analysis. For a uniform pointer the
// compiler aggregates a warp's atomics and waits for the result at once. A single lane that needs
// the result only later must not wait.
template <typename T>
__device__ inline T* opaque_pointer(T* pointer) {
  const u64 bits = reinterpret_cast<u64>(pointer);
  return reinterpret_cast<T*>(__shfl_sync(~0u, bits, thread_index() % 32));
}

// Barrier `id` of the CTA, among `threads` threads: those that wait plus those that only arrive.
// Barrier 0 is __syncthreads.
__device__ inline void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ inline void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

}  // namespace cometrt
