// The epilogue of weight gradients: bf16 or float32, written or added to what is there.
#pragma once

#include "gemm/epilogue.cuh"
#include "gemm/wgrad_problem.cuh"

namespace cometrt {

// out = d, of the rows of out[expert]. A warp's rows all exist, or none of them.
struct OverwriteBf16 {
  static constexpr int kColumns = BLOCK_N, kSteps = 1;

  __device__ static void store(int, u32* pairs, SubtileStore& subtile, const WgradProblem& problem,
                               int expert, long long row, int column) {
    if (row >= problem.num_rows) return;
    __nv_bfloat16* out = static_cast<__nv_bfloat16*>(problem.out);
    const long long out_row = static_cast<long long>(expert) * problem.num_rows + row;
    subtile.store(pairs, out + out_row * problem.num_columns + column, problem.num_columns - column,
                  problem.num_columns);
  }
};

// bf16 results are stashed as those of other GEMMs. float32 results would need as many registers as
// the accumulators: they are stored before the next tile begins. Each element has one writer, so
// that the order of additions is always the same.
class WgradEpilogue : public Epilogue<OverwriteBf16, NoSignal, WgradParams> {
  using Base = Epilogue<OverwriteBf16, NoSignal, WgradParams>;

 public:
  __device__ WgradEpilogue(Shared& shared, const WgradParams& p, int warp,
                           const NoSignal& no_signal)
      : Base(shared, p, warp, no_signal), p_(p), warp_(warp) {}

  __device__ void stash(const WorkTile& tile, float (&d)[128]) {
    const WgradProblem& problem = p_.problem_of(tile);
    const Place at(problem, tile, warp_);
    if (problem.is_float32) {
      float* out = static_cast<float*>(problem.out) + at.element;
      if (p_.accumulate) {
        at.for_each_pair(d, [&](int offset, float& low, float& high) {
          add_relaxed_gpu(out + offset, low, high);
        });
      } else {
        at.for_each_pair(d, [&](int offset, float& low, float& high) {
          __stcs(reinterpret_cast<float2*>(out + offset), make_float2(low, high));
        });
      }
      return;
    }
    if (p_.accumulate) {  // before the only rounding
      at.add_old(static_cast<const __nv_bfloat16*>(problem.out) + at.element, d);
    }
    Base::stash(tile, d);
  }

  // Of an expert without rows; no such tile is accumulated.
  __device__ void stash_zeros(const WorkTile& tile) {
    const WgradProblem& problem = p_.problem_of(tile);
    if (!problem.is_float32) return Base::stash_zeros(tile);
    const Place at(problem, tile, warp_);
    float* out = static_cast<float*>(problem.out) + at.element;
    at.for_each_offset(
        [&](int, int offset) { *reinterpret_cast<float2*>(out + offset) = make_float2(0, 0); });
  }

 private:
  // Of this thread's accumulators in out: pairs of columns in two rows, eight columns apart.
  struct Place {
    int rows, columns, stride;  // of the warp's, how many exist; elements of a row
    long long element;          // of the first pair

    __device__ Place(const WgradProblem& problem, const WorkTile& tile, int warp) {
      const int lane = threadIdx.x % 32, first = tile.m_tile * BLOCK_M + warp * (kHalfM / 4);
      stride = problem.num_columns;
      rows = tile.m_tile < 0 ? 0 : problem.num_rows - first;
      columns = problem.num_columns - tile.n_tile * BLOCK_N;
      const long long row = static_cast<long long>(tile.expert) * problem.num_rows + first;
      element = (row + lane / 4) * stride + tile.n_tile * BLOCK_N + lane % 4 * 2;
    }
    // f(index of the accumulator, offset of its pair)
    template <typename F>
    __device__ void for_each_offset(const F& f) const {
      if (rows <= 0) return;
#pragma unroll
      for (int block = 0; block < BLOCK_N / 8; ++block) {
        if (8 * block >= columns) break;
        f(4 * block, 8 * block);
        f(4 * block + 2, 8 * block + 8 * stride);
      }
    }
    template <typename F>
    __device__ void for_each_pair(float (&d)[128], const F& f) const {
      for_each_offset([&](int i, int offset) { f(offset, d[i], d[i + 1]); });
    }
    __device__ void add_old(const __nv_bfloat16* out, float (&d)[128]) const {
      if (rows <= 0) return;
      constexpr int kAtOnce = 16;  // blocks of eight columns whose loads are under way together
#pragma unroll
      for (int first = 0; first < BLOCK_N / 8; first += kAtOnce) {
        u32 old[2 * kAtOnce];
#pragma unroll
        for (int i = 0; i < 2 * kAtOnce; ++i) {
          const int column = 8 * (first + i / 2), offset = column + i % 2 * 8 * stride;
          old[i] = column < columns ? *reinterpret_cast<const u32*>(out + offset) : 0;
        }
#pragma unroll
        for (int i = 0; i < 2 * kAtOnce; ++i) {
          const float2 pair = unpack(old[i]);
          d[4 * first + 2 * i] += pair.x, d[4 * first + 2 * i + 1] += pair.y;
        }
      }
    }
  };

  const WgradParams& p_;
  int warp_;
};

}  // namespace cometrt
