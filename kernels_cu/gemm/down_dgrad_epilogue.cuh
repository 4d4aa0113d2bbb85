// The epilogue of the down dgrad, da' = dy w_down. It computes row by row, from da' and z:
//
//   a = act(z)   weighted_a = weight a   dz = dact(z, weight da')   dweight = <da', a>
//
// da' is stashed as fp16 pairs. Each row is scaled by a power of two that brings its largest value
// into [2^14, 2^15). fp16 has three more bits than bf16, so almost all of the error of dz comes
// from its one rounding to bf16.
#pragma once

#include "gemm/down_dgrad_math.cuh"
#include "gemm/down_dgrad_shared.cuh"
#include "hopper/async_copy.cuh"

namespace cometrt {

// The epilogue of one warp. A step stores four rows of a subtile. Steps are short, so that the next
// wgmma are issued in time. The order is all subtiles of rows 0 to 7, then all of rows 8 to 15. z
// is loaded into shared memory kZStages steps ahead.
template <int kActivation, int kZStages>
class DownDgradEpilogue {
  static constexpr bool kGated = is_gated(kActivation);
  using Vectors = DownDgradVectors;
  static constexpr int kWarpRows = kHalfM / 4, kSubtiles = BLOCK_N / kSubtileColumns;
  static constexpr int kStepsOfSubtile = 2;  // for eight rows

 public:
  static constexpr int kSteps = 2 * kSubtiles * kStepsOfSubtile;
  static constexpr int kUnrolledSteps = 1;  // not unrolled, since a step's code is long

  // `warp`: index among the multiplying warps.
  __device__ DownDgradEpilogue(DownDgradShared<kZStages>& shared, const DownDgradParams& p,
                               int warp)
      : subtile_(shared.gemm.epilogue_tiles[warp]), rows_(shared.rows[warp]), p_(p), warp_(warp) {
    if (threadIdx.x % 32 == 0) rows_.tiles[0].columns = 0;
    __syncwarp();
  }

  // Before the main loop of a tile. Where its rows lie is kept in shared memory meanwhile, to save
  // registers.
  __device__ void expect(const WorkTile& tile) {
    if (threadIdx.x % 32 == 0) rows_.tiles[1] = rows_of(tile);
    __syncwarp();
  }

  // Rounds a tile's accumulators into the stash.
  __device__ void stash(const WorkTile&, const float (&d)[128]) {
#pragma unroll
    for (int upper = 0; upper < 2; ++upper) {
      const u32 exponent = row_exponent(d, upper);
      const float scale = __uint_as_float((268 - exponent) << 23);  // the largest: [2^14, 2^15)
#pragma unroll
      for (int i = 0; i < 32; ++i) {
        stash_[2 * i + upper] =
            pack_half(scale * d[4 * i + 2 * upper], scale * d[4 * i + 2 * upper + 1]);
      }
      const int lane = threadIdx.x % 32;
      if (lane % 4 == 0) {
        const float inverse = __uint_as_float((exponent - 14) << 23);
        rows_.factors[kSubtileRows * upper + lane / 4].x = inverse;
      }
    }
    begin();
  }
  // For a tile whose rows of this warp are all padding: their results are zero.
  __device__ void stash_zeros(const WorkTile&) {
#pragma unroll
    for (int i = 0; i < 64; ++i) stash_[i] = 0;
    begin();
  }

  // One step of the stashed tile, if there is one. At the end of a subtile the stash of the next
  // one goes to shared memory, so that the next step waits less for it.
  __device__ void store_step(int step) {
    if (rows_.tiles[0].columns == 0) return;
    copy_async_wait<kZStages - 1>();
    __syncwarp();
    store_rows(step);
    __syncwarp();  // all lanes have read what is overwritten below
    load_z(step + kZStages);
    if (step % kStepsOfSubtile == 0) return;
    const int next = step / kStepsOfSubtile + 1;
#pragma unroll
    for (int i = 1; i < 2 * kSubtiles; ++i) {  // unrolled: stash_ lies in registers
      if (next == i) subtile_.put(stash_ + 16 * (i % kSubtiles), i / kSubtiles);
    }
    if (step < kSteps - 1) return;
    if (threadIdx.x % 32 == 0) rows_.tiles[0].columns = 0;
    __syncwarp();
  }
  // All steps of the stashed tile.
  __device__ void flush() {
#pragma unroll 1
    for (int step = 0; step < kSteps; ++step) store_step(step);
  }

 private:
  // The vector of a step that this lane stores, within the warp's rows of the tile.
  struct Position {
    int subtile, row, column;

    __device__ explicit Position(u32 step) {  // unsigned: a division is one shift
      const u32 lane = threadIdx.x % 32, eight = step / kStepsOfSubtile;
      subtile = eight % kSubtiles;
      row = eight / kSubtiles * kSubtileRows + step % kStepsOfSubtile * 4 + lane / 8;
      column = subtile * kSubtileColumns + lane % 8 * 8;
    }
    // Element offsets in weighted_a, and in z and dz, from the warp's first element of each.
    __device__ int of_a(int num_columns) const { return row * num_columns + column; }
    __device__ int of_z(int num_columns) const {
      return kGated ? 2 * row * num_columns + column : of_a(num_columns);
    }
  };

  __device__ int num_n_tiles() const { return (p_.num_columns + BLOCK_N - 1) / BLOCK_N; }

  __device__ RowsOfTile rows_of(const WorkTile& tile) const {
    if (tile.m_tile < 0) return {};
    const int column = tile.n_tile * BLOCK_N, row = warp_ * kWarpRows;
    const long long first = static_cast<long long>(tile.m_tile) * BLOCK_M + row;
    const long long a = first * p_.num_columns + column, z = kGated ? 2 * a - column : a;
    return {p_.weighted_a + a,
            p_.dz + z,
            p_.z + z,
            p_.num_columns - column,
            tile.rows - row,
            static_cast<int>(first),
            static_cast<int>(first) * num_n_tiles() + tile.n_tile};
  }

  // Computes and stores this lane's vector of a step, and adds to dweight of its row.
  __device__ void store_rows(int step) {
    const Position at(step);
    const RowsOfTile& tile = rows_.tiles[0];
    const int lane = threadIdx.x % 32;
    const int4(&z)[2][32] = rows_.z[static_cast<u32>(step) % kZStages];
    int4 scaled = subtile_.vector(at.row % kSubtileRows);
    float2 factors = rows_.factors[at.row];
    if (at.row >= tile.rows) {  // a padding row: its stash may hold anything
      scaled = make_int4(0, 0, 0, 0);
      factors.x = 0;
    }
    Vectors out;
    const float dot =
        down_gradients<kActivation>(scaled, factors.x, factors.y, z[0][lane], z[1][lane], out);
    if (at.column < tile.columns) {
      const int to = at.of_z(p_.num_columns);
      __stcs(reinterpret_cast<int4*>(tile.weighted_a + at.of_a(p_.num_columns)), out.a);
      __stcs(reinterpret_cast<int4*>(tile.dz + to), out.gate);
      if (kGated) __stcs(reinterpret_cast<int4*>(tile.dz + (to + p_.num_columns)), out.up);
    }
    // A subtile takes two steps, so this lane's row had its previous subtile two steps ago.
    float sum = at.subtile == 0 ? dot : rows_.dots[lane] + dot;
    rows_.dots[lane] = last_dot_;
    last_dot_ = sum;
    if (at.subtile < kSubtiles - 1) return;
#pragma unroll
    for (int lanes = 4; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
    if (lane % 8 == 0) p_.dweight[tile.dweight_index + at.row * num_n_tiles()] = sum;
  }

  // Makes the expected tile the stashed one, and starts its first loads.
  __device__ void begin() {
    __syncwarp();
    if (threadIdx.x % 32 == 0) {
      rows_.tiles[0] = rows_.tiles[1];
      rows_.tiles[1].columns = rows_.tiles[1].rows = 0;
    }
    __syncwarp();
    if (rows_.tiles[0].columns == 0) return;
    load_weights();
#pragma unroll 1
    for (int step = 0; step < kZStages; ++step) load_z(step);
    subtile_.put(stash_, 0);
  }

  // Starts to load the rows' router weights. The next load_z commits these copies too.
  __device__ void load_weights() {
    const RowsOfTile& tile = rows_.tiles[0];
    const int lane = threadIdx.x % 32;
    if (lane < kWarpRows) {
      copy_async_4(&rows_.factors[lane].y, p_.row_weight + tile.row + lane, lane < tile.rows);
    }
  }

  // Starts to load z of a step, as one group of copies. Beyond the last step the group is empty, so
  // that copy_async_wait can count groups as steps.
  __device__ void load_z(u32 step) {
    if (step < kSteps) {
      const Position at(step);
      const RowsOfTile& tile = rows_.tiles[0];
      const bool exists = (at.column < tile.columns) & (at.row < tile.rows);
      const __nv_bfloat16* from = tile.z + at.of_z(p_.num_columns);
      int4* to = &rows_.z[step % kZStages][0][threadIdx.x % 32];
      copy_async_16(to, from, exists);
      if (kGated) copy_async_16(to + 32, from + p_.num_columns, exists);
    }
    copy_async_commit();
  }

  SubtileStore subtile_;
  RowStage<kZStages>& rows_;
  const DownDgradParams& p_;
  int warp_;
  u32 stash_[64];   // fp16 pairs in the accumulators' order
  float last_dot_;  // <da', a> of the last step's row, over this lane's columns so far
};

}  // namespace cometrt
