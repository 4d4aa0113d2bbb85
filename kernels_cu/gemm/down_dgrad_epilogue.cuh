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

// What a warp's next step reads, and what belongs to its rows of the stashed tile: registers have
// no room for it.
struct RowStage {
  int4 z[2][2][32];                // [half of a step's rows][gate, up][lane]
  float inverse[2][kSubtileRows];  // of the power of two
  float weight[2][kSubtileRows];
  WorkTile tile;            // m_tile -1: nothing is stashed
  float dot[kSubtileRows];  // of dweight, up to the last subtile
};

struct DownDgradShared {
  Shared gemm;
  RowStage rows[4 * kWarpgroups];  // of each warp that multiplies
};
static_assert(sizeof(DownDgradShared) <= 227 * 1024, "shared memory of an SM");

// A warp's epilogue. A step is eight rows of a subtile; the first four steps are the upper eight
// rows. z comes to shared memory a step ahead.
template <int kActivation>
class DownDgradEpilogue {
  static constexpr bool kGated = is_gated(kActivation);
  static constexpr int kWarpRows = kHalfM / 4, kSubtiles = BLOCK_N / kSubtileColumns;

 public:
  static constexpr int kSteps = 2 * kSubtiles;
  static constexpr int kUnrolledSteps = 1;  // one copy of a step's code is long enough

  // `warp` counts those that multiply.
  __device__ DownDgradEpilogue(DownDgradShared& shared, const DownDgradParams& p, int warp)
      : subtile_(shared.gemm.epilogue_tiles[warp]), rows_(shared.rows[warp]), p_(p), warp_(warp) {
    set_tile({-1, 0, 0, 0, 0});
  }

  __device__ void stash(const WorkTile& tile, const float (&d)[128]) {
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
        rows_.inverse[upper][lane / 4] = __uint_as_float((exponent - 14) << 23);
      }
    }
    begin(tile);
  }
  // This warp's rows of the tile are all padding: their results are zero.
  __device__ void stash_zeros(const WorkTile& tile) {
#pragma unroll
    for (int i = 0; i < 64; ++i) stash_[i] = 0;
    begin(tile);
  }

  __device__ void store_step(int step) {
    if (rows_.tile.m_tile < 0) return;
    const int upper = step / kSubtiles, lane = threadIdx.x % 32;
    copy_async_wait();
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      if (i == step) subtile_.put(stash_ + 16 * (i % kSubtiles), i / kSubtiles);
    }
    __syncwarp();
#pragma unroll 1
    for (int i = 0; i < 2; ++i) store_rows(step, i);
    __syncwarp();  // what the next step overwrites has been read
    if (step == kSteps - 1) {
      set_tile({-1, 0, 0, 0, 0});
    } else {
      load_z(step + 1);
    }
  }
  __device__ void flush() {
#pragma unroll 1
    for (int step = 0; step < kSteps; ++step) store_step(step);
  }

 private:
  struct Vectors {
    int4 gate, up, a;
  };
  // Where a lane's vector of a step lies, in the first four rows or the others.
  struct Place {
    int row;           // in the M-tile
    bool exists;       // the columns do
    long long out, z;  // elements

    __device__ Place(const DownDgradEpilogue& epilogue, int step, int i) {
      const DownDgradParams& p = epilogue.p_;
      const int lane = threadIdx.x % 32;
      row = epilogue.warp_ * kWarpRows + step / kSubtiles * kSubtileRows + 4 * i + lane / 8;
      const int column = epilogue.rows_.tile.n_tile * BLOCK_N + step % kSubtiles * kSubtileColumns;
      const int first = column + lane % 8 * 8;
      exists = first < p.num_columns;
      const long long all = static_cast<long long>(epilogue.rows_.tile.m_tile) * BLOCK_M + row;
      out = all * p.num_columns + first;
      z = all * epilogue.z_stride() + first;
    }
  };

  // Four rows of a step: the first, or the others.
  __device__ void store_rows(int step, int i) {
    const int upper = step / kSubtiles, lane = threadIdx.x % 32, row = 4 * i + lane / 8;
    const Place at(*this, step, i);
    const bool is_padding = at.row >= rows_.tile.rows;
    const float inverse = is_padding ? 0.0f : rows_.inverse[upper][row];
    const int4 da = is_padding ? make_int4(0, 0, 0, 0) : subtile_.vector(row);
    Vectors out;
    float dot = gradients(da, inverse, rows_.weight[upper][row], rows_.z[i][0][lane],
                          rows_.z[i][1][lane], out);
    if (at.exists) {
      __stcs(reinterpret_cast<int4*>(p_.weighted_a + at.out), out.a);
      int4* dz = reinterpret_cast<int4*>(p_.dz + at.z);
      __stcs(dz, out.gate);
      if (kGated) __stcs(dz + p_.num_columns / 8, out.up);
    }
#pragma unroll
    for (int lanes = 4; lanes > 0; lanes /= 2) dot += __shfl_xor_sync(~0u, dot, lanes);
    if (lane % 8 != 0) return;
    const int subtile = step % kSubtiles;
    if (subtile > 0) dot += rows_.dot[row];
    rows_.dot[row] = dot;
    if (subtile == kSubtiles - 1) {
      const int num_n_tiles = (p_.num_columns + BLOCK_N - 1) / BLOCK_N;
      p_.dweight[(static_cast<long long>(rows_.tile.m_tile) * BLOCK_M + at.row) * num_n_tiles +
                 rows_.tile.n_tile] = dot;
    }
  }

  __device__ int z_stride() const { return kGated ? 2 * p_.num_columns : p_.num_columns; }

  __device__ void set_tile(const WorkTile& tile) {
    if (threadIdx.x % 32 == 0) rows_.tile = tile;
    __syncwarp();
  }

  __device__ void begin(const WorkTile& tile) {
    __syncwarp();
    set_tile(tile);
    if (tile.m_tile < 0) return;
    const int lane = threadIdx.x % 32, row = warp_ * kWarpRows + lane;
    if (lane < kWarpRows) {
      const float* weight = p_.row_weight + static_cast<long long>(tile.m_tile) * BLOCK_M + row;
      copy_async_4(&rows_.weight[0][lane], weight, row < tile.rows);
    }
    load_z(0);
  }

  __device__ void load_z(int step) {
    const int lane = threadIdx.x % 32;
#pragma unroll 1
    for (int i = 0; i < 2; ++i) {
      const Place at(*this, step, i);
      const bool exists = at.exists && at.row < rows_.tile.rows;
      const __nv_bfloat16* z = p_.z + (exists ? at.z : 0);
      copy_async_16(&rows_.z[i][0][lane], z, exists);
      if (kGated) copy_async_16(&rows_.z[i][1][lane], z + p_.num_columns, exists);
    }
  }

  // Of eight columns of a row. a is rounded before anything is computed from it, as in the forward.
  // Returns <da', a>.
  __device__ static float gradients(const int4& da, float inverse, float weight, const int4& z_gate,
                                    const int4& z_up, Vectors& out) {
    float dot = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 scaled = unpack_half((&da.x)[i]), gate = unpack((&z_gate.x)[i]);
      const float2 up = kGated ? unpack((&z_up.x)[i]) : make_float2(1, 1);
      const ValueAndSlope low = activation_of(kActivation, gate.x);
      const ValueAndSlope high = activation_of(kActivation, gate.y);
      const float2 a = unpack(pack(low.value * up.x, high.value * up.y));
      const float2 d = {inverse * scaled.x, inverse * scaled.y};
      dot += d.x * a.x + d.y * a.y;
      const float2 weighted = {weight * d.x, weight * d.y};
      (&out.gate.x)[i] = pack(low.slope * up.x * weighted.x, high.slope * up.y * weighted.y);
      (&out.up.x)[i] = pack(low.value * weighted.x, high.value * weighted.y);
      (&out.a.x)[i] = pack(weight * a.x, weight * a.y);
    }
    return dot;
  }

  __device__ static u32 pack_half(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const u32*>(&pair);
  }
  __device__ static float2 unpack_half(u32 pair) {
    return __half22float2(*reinterpret_cast<const __half2*>(&pair));
  }

  SubtileStore subtile_;
  RowStage& rows_;
  const DownDgradParams& p_;
  int warp_;
  u32 stash_[64];  // fp16 pairs in the accumulators' order
};

}  // namespace cometrt
