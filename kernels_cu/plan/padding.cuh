// Zeroes padding rows. `prepare`, `prepare_planned`, `pad` and `prepare_backward` do it for the
// fused kernels, and `dispatch` for the other modes, in inference too.
// Weight gradients multiply an expert's rows up to a multiple of BLOCK_K; cuBLAS's, up to a
// multiple of block_m. Padding must be zero there in every pass, since 0 * NaN would be NaN.
// Nothing else reads it. So a fused forward leaves it as it is in inference, and with
// save="nothing", whose backward pulls all rows again.
#pragma once

#include "protocol/exchange_params.cuh"

namespace cometrt {

// Of `rows` [capacity, hidden], by warp `index` of `count`: those behind an expert's rows, up to a
// multiple of `multiple`.
__device__ inline void zero_padding_rows(const ExchangeParams& params, __nv_bfloat16* rows,
                                         int multiple, int index, int count) {
  const int experts = params.g.local_experts;
  for (int i = index; i < experts * multiple; i += count) {
    const int expert = i % experts, used = params.expert_rows[expert];
    if (used + i / experts >= (used + multiple - 1) / multiple * multiple) continue;
    const int row = params.expert_offsets[expert] + used + i / experts;
    uint4* to = reinterpret_cast<uint4*>(rows + static_cast<long long>(row) * params.g.hidden);
    for (int j = threadIdx.x % 32; j < params.g.hidden / 8; j += 32) to[j] = make_uint4(0, 0, 0, 0);
  }
}

}  // namespace cometrt
