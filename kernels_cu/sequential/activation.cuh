// Parameters of sequential/activation.cu. Mirrored by activation_params_dtype in
// cometrt/kernels/params.py.
#pragma once

#include <cuda_bf16.h>

#include "common/activation.cuh"
#include "common/geometry.cuh"

namespace cometrt {

struct ActivationParams {
  Geometry g;
  const int* expert_offsets;
  const float* row_weight;
  const __nv_bfloat16* z;
  __nv_bfloat16* a;  // forward: a; backward: weight * a
  const float* da;
  __nv_bfloat16* dz;  // may be z: a thread reads an element before it writes there
  float* dweight_rows;
};

}  // namespace cometrt
