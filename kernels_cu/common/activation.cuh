// The activations of cometrt/activations.py in fp32, with derivatives. Used by the engine's
// epilogue and by sequential/activation.cu. At infinity, or where powers of z overflow, the result
// is the limit; NaN gives NaN.
#pragma once

namespace cometrt {

struct ValueAndSlope {
  float value, slope;
};

// Indices into ACTIVATIONS of cometrt/activations.py.
enum Activation : int { kSwiglu, kGeglu, kSilu, kGelu, kRelu, kRelu2 };

__device__ inline constexpr bool is_gated(int kind) { return kind == kSwiglu || kind == kGeglu; }

// Two special-function operations. It underflows to 0 for very negative z.
__device__ inline float sigmoid(float z) { return __fdividef(1.0f, 1.0f + __expf(-z)); }

__device__ inline ValueAndSlope activation_of(int kind, float z) {
  // Beyond kFar every sigmoid is exactly 0 or 1. z is clamped there, since 0 * infinity is NaN. The
  // clamp would drop a NaN, but the sigmoid of the unclamped z keeps it.
  constexpr float kFar = 1000.0f;
  const float above = fmaxf(z, -kFar), near = fminf(above, kFar);
  if (kind == kSwiglu || kind == kSilu) {
    const float s = sigmoid(z);
    return {above * s, s * (1.0f + near * (1.0f - s))};
  }
  if (kind == kGeglu || kind == kGelu) {  // (1 + tanh(u)) / 2 is sigmoid(2 u)
    const float c = 1.5957691216057308f, cube = 0.044715f;
    const float s = sigmoid(c * (z + cube * z * z * z));
    return {above * s, s * (1.0f + near * (1.0f - s) * c * (1.0f + 3.0f * cube * near * near))};
  }
  const float positive = z < 0 ? 0.0f : z;  // fmaxf would turn NaN into 0
  if (kind == kRelu) return {positive, z > 0 ? 1.0f : positive};
  return {positive * positive, 2.0f * positive};
}

}  // namespace cometrt
