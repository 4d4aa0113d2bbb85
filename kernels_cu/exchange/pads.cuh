// Rows that are padding: zero in every pass, since 0 * NaN would be NaN in weight gradients.
#pragma once

#include "exchange/call.cuh"

namespace cometrt {

// By warp `index` of `count`. Each expert has at most block_m - 1 of them, behind its rows.
__device__ inline void zero_pad_rows(const Call& c, int index, int count) {
  const int experts = c.g.local_experts;
  for (int i = index; i < experts * c.g.block_m; i += count) {
    const int expert = i % experts;
    const int row = c.expert_offsets[expert] + c.expert_rows[expert] + i / experts;
    if (row >= c.expert_offsets[expert + 1]) continue;
    uint4* to = reinterpret_cast<uint4*>(c.rows + static_cast<long long>(row) * c.g.hidden);
    for (int j = threadIdx.x % 32; j < c.g.hidden / 8; j += 32) to[j] = make_uint4(0, 0, 0, 0);
  }
}

}  // namespace cometrt
