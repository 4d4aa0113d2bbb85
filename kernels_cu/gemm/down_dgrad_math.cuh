// The arithmetic of the down dgrad's epilogue on da' and z, eight columns of a row at a time.
#pragma once

#include <cuda_fp16.h>

#include "gemm/epilogue.cuh"

namespace cometrt {

// Results for eight columns of a row. gate, up: both halves of dz (gate alone if not gated); a:
// weighted_a.
struct DownDgradVectors {
  int4 gate, up, a;
};

__device__ inline u32 pack_half(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const u32*>(&pair);
}
__device__ inline float2 unpack_half(u32 pair) {
  return __half22float2(*reinterpret_cast<const __half2*>(&pair));
}

// The biased exponent of the largest magnitude in a row of a tile, of which four lanes have 64
// columns each. At least 15, so that the inverse of the row's scale is a normal number. `upper` 1:
// of the lane's second row, eight rows further.
__device__ inline u32 row_exponent(const float (&d)[128], int upper) {
  float largest[4] = {0, 0, 0, 0};  // four independent chains
#pragma unroll
  for (int i = 0; i < 64; ++i) {
    largest[i % 4] = fmaxf(largest[i % 4], fabsf(d[i / 2 * 4 + 2 * upper + i % 2]));
  }
  float most = fmaxf(fmaxf(largest[0], largest[1]), fmaxf(largest[2], largest[3]));
  most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
  most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
  return max(__float_as_uint(most) >> 23, 15u);
}

// Computes `out` for eight columns of a row, where da' = inverse * scaled. a is rounded first, as
// in the forward. Returns <da', a> over these columns.
template <int kActivation>
__device__ inline float down_gradients(const int4& scaled, float inverse, float weight,
                                       const int4& z_gate, const int4& z_up,
                                       DownDgradVectors& out) {
  constexpr bool kGated = is_gated(kActivation);
  const float factor = weight * inverse;
  float dot = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 da = unpack_half((&scaled.x)[i]), gate = unpack((&z_gate.x)[i]);
    const float2 up = kGated ? unpack((&z_up.x)[i]) : make_float2(1, 1);
    const ValueAndSlope low = activation_of(kActivation, gate.x);
    const ValueAndSlope high = activation_of(kActivation, gate.y);
    const float2 a = unpack(pack(low.value * up.x, high.value * up.y));
    dot += da.x * a.x + da.y * a.y;
    const float2 weighted = {factor * da.x, factor * da.y};
    (&out.gate.x)[i] = pack(low.slope * up.x * weighted.x, high.slope * up.y * weighted.y);
    (&out.up.x)[i] = pack(low.value * weighted.x, high.value * weighted.y);
    (&out.a.x)[i] = pack(weight * a.x, weight * a.y);
  }
  return inverse * dot;
}

}  // namespace cometrt
