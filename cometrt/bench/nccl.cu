// What lies between all-to-alls: rows gathered into send buffers, put in the experts' order, and
// added up. One kernel, a warp a row.
#include "common/packed_rows.cuh"

using namespace cometrt;

namespace {

constexpr int kThreads = 256;

}  // namespace

// out[i] = the sum over j of weights[i, j] * row sources[i, j], which is a row of a, or of b where
// it is ~row. -2^31: none. Weights null: 1. Columns are a multiple of 8.
extern "C" __global__ void __launch_bounds__(kThreads)
    add_rows(__nv_bfloat16* out, const __nv_bfloat16* a, const __nv_bfloat16* b, const int* sources,
             const float* weights, int rows, int terms, int columns) {
  constexpr int kNone = -2147483647 - 1;
  const int warps = gridDim.x * kThreads / 32, lane = threadIdx.x % 32;
  for (int i = (blockIdx.x * kThreads + threadIdx.x) / 32; i < rows; i += warps) {
    const int* row_sources = sources + static_cast<long long>(i) * terms;
    const float* row_weights = weights + static_cast<long long>(i) * terms;
    for (int first = 8 * lane; first < columns; first += 1024) {
      float sum[4][8] = {};
      for (int j = 0; j < terms; ++j) {
        const int source = row_sources[j];
        if (source == kNone) continue;
        const float weight = weights == nullptr ? 1.0f : row_weights[j];
        const __nv_bfloat16* row = source >= 0 ? a + static_cast<long long>(source) * columns
                                               : b + static_cast<long long>(~source) * columns;
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          if (first + 256 * k < columns) add_row(sum[k], row + first + 256 * k, weight);
        }
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        if (first + 256 * k < columns) {
          store_row(out + static_cast<long long>(i) * columns + first + 256 * k, sum[k]);
        }
      }
    }
  }
}
