// The activations of cometrt/activations.py in fp32, each with its derivative.
#pragma once

#include <cuda_bf16.h>

#include "common/geometry.cuh"

namespace cometrt {

struct ActivationParams {
  Geometry g;
  const int* expert_offsets;
  const float* row_weight;
  const __nv_bfloat16* z;
  __nv_bfloat16* a;  // forward: a; backward: weight * a
  const float* da;
  __nv_bfloat16* dz;
  float* dweight_rows;
};

struct ValueAndSlope {
  float value, slope;
};

// Numbers of ACTIVATIONS in cometrt/activations.py.
enum Activation : int { kSwiglu, kGeglu, kSilu, kGelu, kRelu, kRelu2 };

__device__ inline ValueAndSlope activation_of(int kind, float z) {
  if (kind == kSwiglu || kind == kSilu) {
    const float small = __expf(-fabsf(z));
    const float s = (z >= 0 ? 1.0f : small) / (1.0f + small);
    return {z * s, s * (1.0f + z * (1.0f - s))};
  }
  if (kind == kGeglu || kind == kGelu) {
    const float c = 0.7978845608028654f, cube = 0.044715f;
    const float t = tanhf(c * (z + cube * z * z * z));
    return {0.5f * z * (1.0f + t),
            0.5f * (1.0f + t) + 0.5f * z * (1.0f - t * t) * c * (1.0f + 3.0f * cube * z * z)};
  }
  const float positive = fmaxf(z, 0.0f);
  if (kind == kRelu) return {positive, z > 0 ? 1.0f : 0.0f};
  return {positive * positive, 2.0f * positive};
}

}  // namespace cometrt
