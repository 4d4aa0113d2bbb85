// Zeroes padding rows. `prepare`, `prepare_planned` and `prepare_backward` do it for the fused
// kernels, and `dispatch` for the other modes.
// Padding must be zero in every pass, since 0 * NaN would be NaN in weight gradients.
#pragma once

#include "protocol/exchange_params.cuh"

namespace cometrt {

// Of `rows` [capacity, hidden], by warp `index` of `count`. An expert has at most block_m - 1
// padding rows, behind its rows.
__device__ inline void zero_padding_rows(const ExchangeParams& params, __nv_bfloat16* rows,
                                         int index, int count) {
  const int experts = params.g.local_experts;
  for (int i = index; i < experts * params.g.block_m; i += count) {
    const int expert = i % experts;
    const int row = params.expert_offsets[expert] + params.expert_rows[expert] + i / experts;
    if (row >= params.expert_offsets[expert + 1]) continue;
    uint4* to = reinterpret_cast<uint4*>(rows + static_cast<long long>(row) * params.g.hidden);
    for (int j = threadIdx.x % 32; j < params.g.hidden / 8; j += 32) to[j] = make_uint4(0, 0, 0, 0);
  }
}

}  // namespace cometrt
