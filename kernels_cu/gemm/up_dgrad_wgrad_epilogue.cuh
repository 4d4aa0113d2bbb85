// The epilogue of the up dgrad and the weight gradients in one launch.
#pragma once

#include "gemm/epilogue.cuh"
#include "gemm/up_dgrad_wgrad.cuh"

namespace cometrt {

// bf16 results are stashed, as those of other GEMMs. float32 results are stored at the tile's end:
// a stash of them would need as many registers as the accumulators. Gradients that are accumulated
// are added at the tile's end too. BoxEpilogue does not fit here, since the combine warps' stages
// leave no shared memory for its boxes. Each element has one writer, so results repeat bit for bit.
// The address of a stashed tile is kept in registers, which takes fewer than computing it in each
// step.
//
// `TileStored` has flag_of(tile), the flag to signal or -1, and signal(flag), which is called one
// step after the tile's last store.
template <typename TileStored>
class UpDgradWgradEpilogue {
  static constexpr int kWarpRows = kHalfM / 4, kSubtiles = BLOCK_N / kSubtileColumns;

 public:
  static constexpr int kSteps = kSubtiles + 1;  // the last one signals
  static constexpr int kUnrolledSteps = kSteps;

  // `warp`: index among the multiplying warps.
  __device__ UpDgradWgradEpilogue(Shared& shared, const UpDgradWgradParams& p, int warp,
                                  const TileStored& tile_stored)
      : subtile_(shared.epilogue_tiles[warp]), p_(p), warp_(warp), tile_stored_(tile_stored) {}

  __device__ void expect(const WorkTile&) {}

  // Stores or stashes a tile's results. Changes d.
  __device__ void stash(const WorkTile& tile, float (&d)[128]) {
    const WgradProblem& problem = p_.problem_of(tile);
    const bool accumulates = p_.accumulate && p_.is_wgrad(tile);
    if (problem.is_float32) {
      const Position at(problem, tile, warp_);
      float* out = static_cast<float*>(problem.out) + at.element;
      if (accumulates) {
        at.for_each_pair(d, [&](int offset, float& low, float& high) {
          add_relaxed_gpu(out + offset, low, high);
        });
      } else {
        at.for_each_pair(d, [&](int offset, float& low, float& high) {
          __stcs(reinterpret_cast<float2*>(out + offset), make_float2(low, high));
        });
      }
    } else if (accumulates) {  // before the only rounding
      const Position at(problem, tile, warp_);
      at.add_old(static_cast<const __nv_bfloat16*>(problem.out) + at.element, d);
    }
    // Also for float32 results, which no step stores. Otherwise the old stash would take registers
    // up to here.
#pragma unroll
    for (int i = 0; i < 64; ++i) stash_[i] = pack(d[2 * i], d[2 * i + 1]);
    begin(problem, tile);
  }

  // For a tile without K (its expert has no rows), or of which this warp has only padding or no
  // rows. Its results are zero. A list of accumulated gradients has no tile without K.
  __device__ void stash_zeros(const WorkTile& tile) {
    const WgradProblem& problem = p_.problem_of(tile);
    if (problem.is_float32) {
      const Position at(problem, tile, warp_);
      float* out = static_cast<float*>(problem.out) + at.element;
      at.for_each_offset(
          [&](int, int offset) { *reinterpret_cast<float2*>(out + offset) = make_float2(0, 0); });
    }
#pragma unroll
    for (int i = 0; i < 64; ++i) stash_[i] = 0;
    begin(problem, tile);
  }

  // One step of the stashed tile, if there is one. `index`: a constant after unrolling.
  __device__ void store_step(int index) {
    if (index < kSubtiles) {
      const int column = index * kSubtileColumns;
      if (column < columns_) {
        subtile_.store(stash_ + 16 * index, to_ + column, columns_ - column, stride_);
      }
      if (index == kSubtiles - 1) columns_ = 0;
    } else if (flag_ >= 0) {
      tile_stored_.signal(flag_);
      flag_ = -1;
    }
  }
  // All steps of the stashed tile.
  __device__ void flush() {
#pragma unroll
    for (int index = 0; index < kSteps; ++index) store_step(index);
  }

 private:
  // Where this thread's accumulators lie in out: pairs of columns in two rows that are eight apart.
  // The next pair of a row is eight columns further.
  struct Position {
    int rows, columns, stride;  // existing ones from the warp's first on; elements of a row
    long long element;          // of the first pair

    __device__ Position(const WgradProblem& problem, const WorkTile& tile, int warp) {
      const int lane = threadIdx.x % 32, first = tile.m_tile * BLOCK_M + warp * (kHalfM / 4);
      stride = problem.num_columns;
      rows = tile.m_tile < 0 ? 0 : problem.num_rows - first;
      columns = problem.num_columns - tile.n_tile * BLOCK_N;
      const long long row = static_cast<long long>(tile.expert) * problem.num_rows + first;
      element = (row + lane / 4) * stride + tile.n_tile * BLOCK_N + lane % 4 * 2;
    }
    // Calls f(index of the accumulator, offset of its pair in out) for each pair that exists.
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
    // Adds the old bf16 values to d.
    __device__ void add_old(const __nv_bfloat16* out, float (&d)[128]) const {
      if (rows <= 0) return;
      constexpr int kAtOnce = 16;  // blocks of eight columns whose loads are in flight together
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

  // Sets what the next steps store and signal.
  __device__ void begin(const WgradProblem& problem, const WorkTile& tile) {
    const int row = tile.m_tile * BLOCK_M + warp_ * kWarpRows, column = tile.n_tile * BLOCK_N;
    const long long out_row = static_cast<long long>(tile.expert) * problem.expert_stride + row;
    stride_ = problem.num_columns;
    to_ = static_cast<__nv_bfloat16*>(problem.out) + out_row * stride_ + column;
    // A warp's rows all exist, or none of them.
    const bool stores = tile.m_tile >= 0 && row < problem.num_rows && !problem.is_float32;
    columns_ = stores ? stride_ - column : 0;
    flag_ = tile.m_tile < 0 ? -1 : tile_stored_.flag_of(tile);
  }
  SubtileStore subtile_;
  const UpDgradWgradParams& p_;
  int warp_;
  const TileStored& tile_stored_;
  u32 stash_[64];  // bf16 pairs in accumulator order
  __nv_bfloat16* to_ = nullptr;
  int columns_ = 0, stride_ = 0;  // columns_: of the stashed tile; 0 if there is none
  int flag_ = -1;
};

}  // namespace cometrt
