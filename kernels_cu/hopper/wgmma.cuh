// PTX wrappers for wgmma: a warpgroup multiplies bf16 tiles in shared memory into fp32 registers.
#pragma once

#include "hopper/mbarrier.cuh"

namespace cometrt {

// Which extent of an operand is contiguous in memory: K, or the other one, M of a and N of b.
enum class Major : int { kK, kMN };

// Descriptor of a K-major bf16 tile of 64 columns (128 bytes), 1024-byte aligned, in the 128-byte
// swizzle. Groups of 8 rows are 1024 bytes apart. Add 2 for the next 16 columns (32 bytes).
__device__ inline u64 wgmma_descriptor(const void* tile) {
  const u64 kStrideBytes = 1024, kSwizzle128 = 1;
  return ((shared_address(tile) & 0x3ffff) >> 4) | (1ull << 16) | ((kStrideBytes >> 4) << 32) |
         (kSwizzle128 << 62);
}

// Describes an MN-major bf16 tile: boxes of 64 columns of M or N by 64 rows of K, one behind the
// other. Each is 8192 bytes, 1024-byte aligned, its rows 128 bytes with the same swizzle: groups of
// 8 rows are 1024 bytes apart. The next 16 rows are 2048 bytes further: add 128.
__device__ inline u64 wgmma_descriptor_mn(const void* tile) {
  const u64 kBoxBytes = 8192, kStrideBytes = 1024, kSwizzle128 = 1;
  return ((shared_address(tile) & 0x3ffff) >> 4) | ((kBoxBytes >> 4) << 16) |
         ((kStrideBytes >> 4) << 32) | (kSwizzle128 << 62);
}

__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ inline void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int kPending>
__device__ inline void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// The operands of eight accumulators, from d[i] on.
#define COMETRT_D8(i)                                                                         \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])

// d [64, N] = a [64, 16] b [N, 16]^T, added to d unless `accumulate` is 0. N = 256 or 128, by the
// size of d. Asynchronous: complete after wgmma_commit and wgmma_wait. Thread t of the warpgroup
// holds d[i] at row 16 * (t / 32) + t % 32 / 4 + 8 * (i / 2 % 2), column 8 * (i / 4) + 2 * (t % 4)
// + i % 2. MN-major operands lie in shared memory as a^T and b^T.
template <Major kMajorA = Major::kK, Major kMajorB = Major::kK>
__device__ inline void wgmma_m64k16(float (&d)[128], u64 a, u64 b, int accumulate) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %130, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
      "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
      "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, "
      "%127"
      "}, %128, %129, p, 1, 1, %131, %132;\n"
      "}\n"
      : COMETRT_D8(0), COMETRT_D8(8), COMETRT_D8(16), COMETRT_D8(24), COMETRT_D8(32),
        COMETRT_D8(40), COMETRT_D8(48), COMETRT_D8(56), COMETRT_D8(64), COMETRT_D8(72),
        COMETRT_D8(80), COMETRT_D8(88), COMETRT_D8(96), COMETRT_D8(104), COMETRT_D8(112),
        COMETRT_D8(120)
      : "l"(a), "l"(b), "r"(accumulate), "n"(static_cast<int>(kMajorA)),
        "n"(static_cast<int>(kMajorB))
      : "memory");
}

template <Major kMajorA = Major::kK, Major kMajorB = Major::kK>
__device__ inline void wgmma_m64k16(float (&d)[64], u64 a, u64 b, int accumulate) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
      "}, %64, %65, p, 1, 1, %67, %68;\n"
      "}\n"
      : COMETRT_D8(0), COMETRT_D8(8), COMETRT_D8(16), COMETRT_D8(24), COMETRT_D8(32),
        COMETRT_D8(40), COMETRT_D8(48), COMETRT_D8(56)
      : "l"(a), "l"(b), "r"(accumulate), "n"(static_cast<int>(kMajorA)),
        "n"(static_cast<int>(kMajorB))
      : "memory");
}
#undef COMETRT_D8

}  // namespace cometrt
