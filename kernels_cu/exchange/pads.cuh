// Rows that are padding: zero in every pass, since 0 * NaN would be NaN in weight gradients.
#pragma once

#include "exchange/call.cuh"

namespace cometrt {

// By warp `index` of `count`.
__device__ inline void zero_pad_rows(const Call& c, int index, int count) {
  const int num_rows = c.expert_offsets[c.g.local_experts];
  for (int row = index; row < num_rows; row += count) {
    if (c.row_pair[row] >= 0) continue;
    uint4* to = reinterpret_cast<uint4*>(c.rows + static_cast<long long>(row) * c.g.hidden);
    for (int i = threadIdx.x % 32; i < c.g.hidden / 8; i += 32) to[i] = make_uint4(0, 0, 0, 0);
  }
}

}  // namespace cometrt
