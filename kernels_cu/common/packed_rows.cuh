// Vectors of eight bf16 columns (16 bytes): weighted sums in fp32, and their store. Used by every
// kernel that combines rows.
#pragma once

#include <cuda_bf16.h>

#include "hopper/memory.cuh"

namespace cometrt {

// sum += weight * packed, one fma and so one rounding a column. A bf16 is the upper half of an
// fp32.
__device__ inline void add_packed(float (&sum)[8], uint4 packed, float weight) {
  const u32 pairs[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    sum[2 * i] = fmaf(weight, __uint_as_float(pairs[i] << 16), sum[2 * i]);
    sum[2 * i + 1] = fmaf(weight, __uint_as_float(pairs[i] & 0xffff0000u), sum[2 * i + 1]);
  }
}

__device__ inline void add_row(float (&sum)[8], const __nv_bfloat16* row, float weight) {
  add_packed(sum, *reinterpret_cast<const uint4*>(row), weight);
}

__device__ inline void store_row(__nv_bfloat16* row, const float (&sum)[8]) {
  uint4 packed;
  __nv_bfloat162* pairs = reinterpret_cast<__nv_bfloat162*>(&packed);
#pragma unroll
  for (int i = 0; i < 4; ++i) pairs[i] = __floats2bfloat162_rn(sum[2 * i], sum[2 * i + 1]);
  __stcs(reinterpret_cast<uint4*>(row), packed);
}

}  // namespace cometrt
