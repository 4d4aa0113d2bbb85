// Element-wise kernels between cuBLAS GEMMs: the forward's activation, and what follows the
// backward's first GEMM. Used with gemm="cublas" only. Stream order synchronises them.
#include <cuda_bf16.h>

#include "common/geometry.cuh"
#include "sequential/activation.cuh"

using namespace cometrt;

namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

}  // namespace

// a [rows, I_s] = act(z [rows, up_columns]). One warp per row.
extern "C" __global__ void __launch_bounds__(kThreads)
    activate(const __grid_constant__ ActivationParams p) {
  const int num_rows = p.expert_offsets[p.g.local_experts], width = p.g.local_intermediate;
  for (int row = blockIdx.x * kWarps + threadIdx.x / 32; row < num_rows;
       row += gridDim.x * kWarps) {
    const __nv_bfloat16* z = p.z + static_cast<long long>(row) * p.g.up_columns;
    for (int i = threadIdx.x % 32; i < width; i += 32) {
      const float gate = __bfloat162float(z[i]);
      const float up = p.g.gated ? __bfloat162float(z[width + i]) : 1.0f;
      p.a[static_cast<long long>(row) * width + i] =
          __float2bfloat16(activation_of(p.g.activation, gate).value * up);
    }
  }
}

// From da' [rows, I_s] (fp32) and z: dweight = <da', a>, dz = dact(z, weight * da'), a = weight *
// act(z). One warp per row.
extern "C" __global__ void __launch_bounds__(kThreads)
    activate_backward(const __grid_constant__ ActivationParams p) {
  const int num_rows = p.expert_offsets[p.g.local_experts], width = p.g.local_intermediate;
  for (int row = blockIdx.x * kWarps + threadIdx.x / 32; row < num_rows;
       row += gridDim.x * kWarps) {
    const long long at = static_cast<long long>(row) * width;
    const long long z_at = static_cast<long long>(row) * p.g.up_columns;
    const float weight = p.row_weight[row];
    float dot = 0;
    for (int i = threadIdx.x % 32; i < width; i += 32) {
      const float gate = __bfloat162float(p.z[z_at + i]);
      const float up = p.g.gated ? __bfloat162float(p.z[z_at + width + i]) : 1.0f;
      const ValueAndSlope act = activation_of(p.g.activation, gate);
      const float a = __bfloat162float(__float2bfloat16(act.value * up));
      const float da = p.da[at + i];
      dot += da * a;
      p.dz[z_at + i] = __float2bfloat16(act.slope * up * weight * da);
      if (p.g.gated) p.dz[z_at + width + i] = __float2bfloat16(act.value * weight * da);
      p.a[at + i] = __float2bfloat16(weight * a);
    }
    for (int step = 16; step > 0; step /= 2) dot += __shfl_xor_sync(~0u, dot, step);
    if (threadIdx.x % 32 == 0) p.dweight_rows[row] = dot;
  }
}
