// The epilogue of a multiplying warp. It rounds a tile's accumulators to bf16 and stashes them in
// registers, then stores them in steps under the next tile's main loop. Storing them at once would
// stall both warpgroups on the SM's stores. Policies say what is computed (Forward) and who is
// signalled (NoSignal, or a kernel's own).
#pragma once

#include "common/activation.cuh"
#include "gemm/tile.cuh"
#include "hopper/warpgroup.cuh"

namespace cometrt {

__device__ inline u32 pack(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const u32*>(&pair);
}

__device__ inline float2 unpack(u32 pair) {
  return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&pair));
}

// Stores an epilogue subtile of a warp: 64 columns of its 16 rows, rows 0 to 7 and then 8 to 15. It
// goes through shared memory, so that eight lanes write 128 contiguous bytes of a row.
class SubtileStore {
 public:
  __device__ explicit SubtileStore(EpilogueTile& tile)
      : tile_(reinterpret_cast<char*>(tile.values)) {}

  // `pairs` [16]: for each 8 columns, this thread's bf16 pair of row r and of row r + 8, as in the
  // accumulators. `to`: row 0, column 0 of the subtile, which has `columns` valid columns. `rows`:
  // how many of the 16 rows are stored; not negative.
  __device__ void store(const u32* pairs, __nv_bfloat16* to, int columns, long long stride,
                        int rows = 2 * kSubtileRows) {
    const int lane = threadIdx.x % 32, vector_idx = lane % 8;
    to += lane / 8 * stride + 8 * vector_idx;
#pragma unroll
    for (int upper = 0; upper < 2; ++upper, to += 8 * stride) {
      if (kSubtileRows * upper >= rows) return;
      __syncwarp();  // all lanes have read the last rows
      put(pairs, upper);
      __syncwarp();
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int4 value = vector(4 * i + lane / 8);
        // Streaming stores: results must not evict operands from L2.
        const int row = kSubtileRows * upper + 4 * i + lane / 8;
        const bool exists = rows >= 2 * kSubtileRows || row < rows;
        if (8 * vector_idx < columns && exists) {
          __stcs(reinterpret_cast<int4*>(to + 4 * i * stride), value);
        }
      }
    }
  }
  // Writes eight rows of `pairs` to shared memory. `upper` 0: rows 0 to 7; 1: rows 8 to 15.
  __device__ void put(const u32* pairs, int upper) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 2; ++i) {  // 32 columns: matrices 4 i to 4 i + 3, 16 bytes a row, swizzled
      char* row = tile_ + lane % 8 * 128 + 16 * ((4 * i + lane / 8) ^ (lane % 8));
      store_matrices(row, pairs[8 * i + upper], pairs[8 * i + 2 + upper], pairs[8 * i + 4 + upper],
                     pairs[8 * i + 6 + upper]);
    }
  }
  // This lane's eight columns of a row that put() has written. `row`: 0 to 7.
  __device__ int4 vector(int row) const {
    return *reinterpret_cast<const int4*>(tile_ + row * 128 + 16 * (threadIdx.x % 8 ^ row));
  }

 private:
  char* tile_;
};

// What the forward stores of accumulators d, by subtiles of 64 columns. `kActivation` -1: out = d.
// Otherwise out = act(d), and z = d if `kWriteZ`. out is computed from the rounded z, so that
// backward recomputes the same bits. `kStoresPadding`: padding rows are stored too. Where nobody
// reads them, as in inference, their bytes would cost more than all others in a small batch.
template <int kActivation, bool kWriteZ, bool kStoresPadding = true>
struct Forward {
  static constexpr bool kActivates = kActivation >= 0, kGated = kActivates && is_gated(kActivation);
  static constexpr int kColumns = kGated ? kHalfN : BLOCK_N;  // columns of out in an N-tile
  static constexpr int kUpBehind = kAccumulators / 4;         // pairs from gate's to up's
  // Steps of a subtile: store z (gate, then up); activate its first half; activate the rest and
  // store out. Kernels without z or activation have no such steps.
  static constexpr int kStoresOfZ = kActivates && kWriteZ ? (kGated ? 2 : 1) : 0;
  static constexpr int kSteps = kStoresOfZ + (kActivates ? 2 : 1);

  // Does one step of the subtile that begins at `row` and `column` of out. `first` [16]: its
  // stashed pairs (of gate, if gated; then up's are kUpBehind further), replaced by out when
  // activated. `rows`: of the warp's 16 rows, those that are no padding; 0 or less: none. `step`
  // must be a compile-time constant after unrolling, since `first` is indexed in registers.
  __device__ static void store(int step, u32* first, SubtileStore& subtile, const Problem& problem,
                               int, long long row, int column, int rows) {
    if (kStoresPadding) rows = 2 * kSubtileRows;
    if (rows <= 0) return;
    const u32* up = kGated ? first + kUpBehind : first;
    const int columns = problem.num_columns - column;
    if (step < kStoresOfZ) {
      const int stride = kGated ? 2 * problem.num_columns : problem.num_columns;
      __nv_bfloat16* to = problem.z + row * stride + column + step * problem.num_columns;
      subtile.store(step == 0 ? first : up, to, columns, stride, rows);
      return;
    }
    if (kActivates) {
      const int begin = 8 * (step - kStoresOfZ);
#pragma unroll
      for (int i = 0; i < 8; ++i) first[begin + i] = activate(first[begin + i], up[begin + i]);
      if (begin == 0) return;
    }
    subtile.store(first, problem.out + row * problem.num_columns + column, columns,
                  problem.num_columns, rows);
  }

 private:
  __device__ static u32 activate(u32 gate, u32 up) {
    const float2 g = unpack(gate), u = unpack(up);
    const float low = activation_of(kActivation, g.x).value;
    const float high = activation_of(kActivation, g.y).value;
    return kGated ? pack(low * u.x, high * u.y) : pack(low, high);
  }
};

// For GEMMs whose results only later launches read.
struct NoSignal {
  static constexpr bool kSignals = false;
  __device__ void signal(const WorkTile&) const {}
};

// One warp's epilogue: stash() a tile, then its steps under the next tile's main loop. `Math`: what
// a step stores. `TileStored`: signal(tile) is called one step after the tile's last store.
template <typename Math, typename TileStored, typename Params = GemmParams>
class Epilogue {
  static constexpr int kWarpRows = kHalfM / 4, kPairs = kAccumulators / 2;  // of bf16

 public:
  static constexpr int kSteps =
      Math::kColumns / kSubtileColumns * Math::kSteps + (TileStored::kSignals ? 1 : 0);
  static constexpr int kUnrolledSteps = kSteps;  // store_step needs a constant index

  // `warp`: index among the multiplying warps.
  __device__ Epilogue(Shared& shared, const Params& p, int warp, const TileStored& tile_stored)
      : subtile_(shared.epilogue_tiles[warp]), p_(p), warp_(warp), tile_stored_(tile_stored) {}

  // Before the main loop of a tile.
  __device__ void expect(const WorkTile&) {}
  // Rounds a tile's accumulators into the stash.
  __device__ void stash(const WorkTile& tile, const float (&d)[kAccumulators]) {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) stash_[i] = pack(d[2 * i], d[2 * i + 1]);
    tile_ = tile;
  }
  // For a tile whose rows of this warp are all padding: their results, if stored, are zero.
  __device__ void stash_zeros(const WorkTile& tile) {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) stash_[i] = 0;
    tile_ = tile;
  }

  // One step of the stashed tile, if there is one. `index`: a constant after unrolling.
  __device__ void store_step(int index) {
    if (tile_.m_tile < 0) return;
    if (TileStored::kSignals && index == kSteps - 1) {
      tile_stored_.signal(tile_);
    } else {
      const int subtile = index / Math::kSteps;
      const long long row = static_cast<long long>(tile_.m_tile) * BLOCK_M + warp_ * kWarpRows;
      const int column = tile_.n_tile * Math::kColumns + subtile * kSubtileColumns;
      Math::store(index % Math::kSteps, stash_ + 16 * subtile, subtile_, p_.problem_of(tile_),
                  tile_.expert, row, column, tile_.rows - warp_ * kWarpRows);
    }
    if (index == kSteps - 1) tile_.m_tile = -1;
  }
  // All steps of the stashed tile.
  __device__ void flush() {
#pragma unroll
    for (int index = 0; index < kSteps; ++index) store_step(index);
  }

 private:
  SubtileStore subtile_;
  const Params& p_;
  int warp_;
  const TileStored& tile_stored_;
  u32 stash_[kPairs];  // in accumulator order
  WorkTile tile_{-1, 0, 0, 0, 0};
};

}  // namespace cometrt
