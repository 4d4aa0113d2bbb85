// Eight columns of a row at a time, added in fp32.
#pragma once

#include <cuda_bf16.h>

#include "hopper/memory.cuh"

namespace cometrt {

__device__ inline void add_packed(float (&sum)[8], uint4 packed, float weight) {
  const __nv_bfloat162* pairs = reinterpret_cast<const __nv_bfloat162*>(&packed);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 two = __bfloat1622float2(pairs[i]);
    sum[2 * i] += __fmul_rn(weight, two.x);
    sum[2 * i + 1] += __fmul_rn(weight, two.y);
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
