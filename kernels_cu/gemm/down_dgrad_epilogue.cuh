// The epilogue of da' = dy w_down: from da' and z to what the rest of the backward needs of a row.
//
//   a = act(z)   weighted_a = weight a   dz = dact(z, weight da')   dweight = <da', a>
//
// da' is stashed as fp16 pairs under a power of two for each row, as large as the row allows. It
// has three bits more than bf16 then, so that dz has one rounding to bf16 and hardly any other.
#pragma once

#include <cuda_fp16.h>

#include "gemm/epilogue.cuh"
#include "hopper/async_copy.cuh"

namespace cometrt {

// Mirrored by down_dgrad_params_dtype in cometrt/kernels/params.py.
struct DownDgradParams : TileList {
  const __nv_bfloat16* z;     // [rows, gate and up, num_columns]
  const float* row_weight;    // [rows]
  __nv_bfloat16* dz;          // as z
  __nv_bfloat16* weighted_a;  // [rows, num_columns]
  float* dweight;             // [rows, N-tiles]: partial sums over the columns of an N-tile
  int num_columns, num_inner_blocks;

  static constexpr bool kMayBeEmpty = false;

  __device__ int num_k_blocks(const WorkTile&) const { return num_inner_blocks; }
  __device__ int first_k(const WorkTile&) const { return 0; }
};

// What a warp's next steps read, and what belongs to its rows of the stashed tile: registers have
// no room for it. kZStages: steps whose z is under way.
template <int kZStages>
struct RowStage {
  int4 z[kZStages][2][32];  // [gate, up][lane]
  WorkTile tile, next;      // stashed, or m_tile -1; being multiplied
  float inverse[16];        // of each row: of its power of two,
  float weight[16];         // its weight,
  float dot[16];            // and its dweight, up to the last subtile
};

template <int kZStages>
struct DownDgradShared {
  Shared gemm;
  RowStage<kZStages> rows[4 * kWarpgroups];  // of each warp that multiplies
};

// A warp's epilogue. A step is four rows of a subtile: short, so that the next products are asked
// for in time. All subtiles of the upper eight rows come first. z comes to shared memory a few
// steps ahead.
template <int kActivation, int kZStages>
class DownDgradEpilogue {
  static constexpr bool kGated = is_gated(kActivation);
  static constexpr int kWarpRows = kHalfM / 4, kSubtiles = BLOCK_N / kSubtileColumns;
  static constexpr int kStepsOfSubtile = 2;  // of eight rows

 public:
  static constexpr int kSteps = 2 * kSubtiles * kStepsOfSubtile;
  static constexpr int kUnrolledSteps = 1;  // one copy of a step's code is long enough

  // `warp` counts those that multiply.
  __device__ DownDgradEpilogue(DownDgradShared<kZStages>& shared, const DownDgradParams& p,
                               int warp)
      : subtile_(shared.gemm.epilogue_tiles[warp]), rows_(shared.rows[warp]), p_(p), warp_(warp) {
    set_tile({-1, 0, 0, 0, 0});
  }

  // The tile that comes next: kept here, not in registers, while it is multiplied.
  __device__ void expect(const WorkTile& tile) {
    if (threadIdx.x % 32 == 0) rows_.next = tile;
  }

  __device__ void stash(const WorkTile&, const float (&d)[128]) {
#pragma unroll
    for (int upper = 0; upper < 2; ++upper) {
      // The largest of the row's columns in this tile, of which four lanes have 64 each.
      float largest[4] = {0, 0, 0, 0};  // of a few chains
#pragma unroll
      for (int i = 0; i < 64; ++i) {
        largest[i % 4] = fmaxf(largest[i % 4], fabsf(d[i / 2 * 4 + 2 * upper + i % 2]));
      }
      float most = fmaxf(fmaxf(largest[0], largest[1]), fmaxf(largest[2], largest[3]));
      most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
      most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
      const u32 exponent = max(__float_as_uint(most) >> 23, 15u);
      const float scale = __uint_as_float((268 - exponent) << 23);  // most becomes [2^14, 2^15)
#pragma unroll
      for (int i = 0; i < 32; ++i) {
        stash_[2 * i + upper] =
            pack_half(scale * d[4 * i + 2 * upper], scale * d[4 * i + 2 * upper + 1]);
      }
      const int lane = threadIdx.x % 32;
      if (lane % 4 == 0) {
        rows_.inverse[kSubtileRows * upper + lane / 4] = __uint_as_float((exponent - 14) << 23);
      }
    }
    begin();
  }
  // This warp's rows of the tile are all padding: their results are zero.
  __device__ void stash_zeros(const WorkTile&) {
#pragma unroll
    for (int i = 0; i < 64; ++i) stash_[i] = 0;
    begin();
  }

  __device__ void store_step(int step) {
    if (rows_.tile.m_tile < 0) return;
    copy_async_wait<kZStages - 1>();
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 2 * kSubtiles; ++i) {  // the compiler must know which registers
      if (step == kStepsOfSubtile * i) subtile_.put(stash_ + 16 * (i % kSubtiles), i / kSubtiles);
    }
    __syncwarp();
    store_rows(step);
    __syncwarp();  // what the next step overwrites has been read
    load_z(step + kZStages);
    if (step == kSteps - 1) set_tile({-1, 0, 0, 0, 0});
  }
  __device__ void flush() {
#pragma unroll 1
    for (int step = 0; step < kSteps; ++step) store_step(step);
  }

 private:
  struct Vectors {
    int4 gate, up, a;
  };
  // Where a lane's vector of a step lies.
  struct Place {
    int subtile, row;  // row: of the warp's
    int column;
    long long out;  // the element of a result

    __device__ Place(const DownDgradEpilogue& epilogue, int step) {
      const DownDgradParams& p = epilogue.p_;
      const WorkTile& tile = epilogue.rows_.tile;
      const int lane = threadIdx.x % 32, eight = step / kStepsOfSubtile;
      subtile = eight % kSubtiles;
      row = eight / kSubtiles * kSubtileRows + step % kStepsOfSubtile * 4 + lane / 8;
      column = tile.n_tile * BLOCK_N + subtile * kSubtileColumns + lane % 8 * 8;
      const long long all =
          static_cast<long long>(tile.m_tile) * BLOCK_M + epilogue.warp_ * kWarpRows + row;
      out = all * p.num_columns + column;
    }
    // The element of z: rows of gate and up are twice as long.
    __device__ long long z() const { return kGated ? 2 * out - column : out; }
  };

  __device__ void store_rows(int step) {
    const Place at(*this, step);
    const int lane = threadIdx.x % 32;
    const bool is_padding = warp_ * kWarpRows + at.row >= rows_.tile.rows;
    const float inverse = is_padding ? 0.0f : rows_.inverse[at.row];
    const int4 scaled = is_padding ? make_int4(0, 0, 0, 0) : subtile_.vector(at.row % kSubtileRows);
    Vectors out;
    const int4(&z)[2][32] = rows_.z[step % kZStages];
    float dot = gradients(scaled, inverse, rows_.weight[at.row], z[0][lane], z[1][lane], out);
    if (at.column < p_.num_columns) {
      __stcs(reinterpret_cast<int4*>(p_.weighted_a + at.out), out.a);
      int4* dz = reinterpret_cast<int4*>(p_.dz + at.z());
      __stcs(dz, out.gate);
      if (kGated) __stcs(dz + p_.num_columns / 8, out.up);
    }
#pragma unroll
    for (int lanes = 4; lanes > 0; lanes /= 2) dot += __shfl_xor_sync(~0u, dot, lanes);
    if (lane % 8 != 0) return;
    if (at.subtile > 0) dot += rows_.dot[at.row];
    rows_.dot[at.row] = dot;
    if (at.subtile == kSubtiles - 1) {
      const int num_n_tiles = (p_.num_columns + BLOCK_N - 1) / BLOCK_N;
      const int row = warp_ * kWarpRows + at.row;
      const long long all = static_cast<long long>(rows_.tile.m_tile) * BLOCK_M + row;
      p_.dweight[all * num_n_tiles + rows_.tile.n_tile] = dot;
    }
  }

  // By all lanes: one of them writes.
  __device__ void set_tile(const WorkTile& tile) {
    if (threadIdx.x % 32 == 0) rows_.tile = tile;
    __syncwarp();
  }

  __device__ void begin() {
    __syncwarp();
    set_tile(rows_.next);
    const WorkTile& tile = rows_.tile;
    if (tile.m_tile < 0) return;
    const int lane = threadIdx.x % 32, row = warp_ * kWarpRows + lane;
    if (lane < kWarpRows) {
      const float* weight = p_.row_weight + static_cast<long long>(tile.m_tile) * BLOCK_M + row;
      copy_async_4(&rows_.weight[lane], weight, row < tile.rows);
    }
#pragma unroll 1
    for (int step = 0; step < kZStages; ++step) load_z(step);
  }

  // A group of copies, also where there is no such step: so groups count steps.
  __device__ void load_z(int step) {
    if (step < kSteps) {
      const Place at(*this, step);
      const bool exists =
          at.column < p_.num_columns && warp_ * kWarpRows + at.row < rows_.tile.rows;
      const __nv_bfloat16* from = p_.z + (exists ? at.z() : 0);
      int4* to = &rows_.z[step % kZStages][0][threadIdx.x % 32];
      copy_async_16(to, from, exists);
      if (kGated) copy_async_16(to + 32, from + p_.num_columns, exists);
    }
    copy_async_commit();
  }

  // Of eight columns of a row, where da' is inverse * scaled. a is rounded before anything is
  // computed from it, as in the forward. Returns <da', a>.
  __device__ static float gradients(const int4& scaled, float inverse, float weight,
                                    const int4& z_gate, const int4& z_up, Vectors& out) {
    const float factor = weight * inverse;
    float dot = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 da = unpack_half((&scaled.x)[i]), gate = unpack((&z_gate.x)[i]);
      const float2 up = kGated ? unpack((&z_up.x)[i]) : make_float2(1, 1);
      const ValueAndSlope low = activation_of(kActivation, gate.x);
      const ValueAndSlope high = activation_of(kActivation, gate.y);
      const float2 a = unpack(pack(low.value * up.x, high.value * up.y));
      dot += da.x * a.x + da.y * a.y;
      const float2 weighted = {factor * da.x, factor * da.y};
      (&out.gate.x)[i] = pack(low.slope * up.x * weighted.x, high.slope * up.y * weighted.y);
      (&out.up.x)[i] = pack(low.value * weighted.x, high.value * weighted.y);
      (&out.a.x)[i] = pack(weight * a.x, weight * a.y);
    }
    return inverse * dot;
  }

  __device__ static u32 pack_half(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const u32*>(&pair);
  }
  __device__ static float2 unpack_half(u32 pair) {
    return __half22float2(*reinterpret_cast<const __half2*>(&pair));
  }

  SubtileStore subtile_;
  RowStage<kZStages>& rows_;
  const DownDgradParams& p_;
  int warp_;
  u32 stash_[64];  // fp16 pairs in the accumulators' order
};

}  // namespace cometrt
