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

// d [64, 128] = a [64, 16] b [128, 16]^T, added to d unless `accumulate` is 0. Asynchronous:
// complete after wgmma_commit and wgmma_wait. Thread t of the warpgroup holds d[i] at row 16 * (t /
// 32) + t % 32 / 4 + 8 * (i / 2 % 2), column 8 * (i / 4) + 2 * (t % 4) + i % 2.
__device__ inline void wgmma_m64n128k16(float (&d)[64], u64 a, u64 b, int accumulate) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
      "}, %64, %65, p, 1, 1, 0, 0;\n"
      "}\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),
        "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]),
        "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]),
        "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]),
        "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]),
        "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]),
        "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]),
        "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]),
        "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]),
        "+f"(d[63])
      : "l"(a), "l"(b), "r"(accumulate)
      : "memory");
}

// As above with b [256, 16]: d [64, 256], in 128 registers. MN-major operands lie in shared memory
// as a^T and b^T.
template <Major kMajorA = Major::kK, Major kMajorB = Major::kK>
__device__ inline void wgmma_m64n256k16(float (&d)[128], u64 a, u64 b, int accumulate) {
#define COMETRT_D8(i)                                                                         \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
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
#undef COMETRT_D8
}

}  // namespace cometrt
