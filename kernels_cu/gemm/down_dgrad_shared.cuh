// The down dgrad's parameters and the shared memory of its CTA.
#pragma once

#include "gemm/tile.cuh"

namespace cometrt {

// Mirrored by down_dgrad_params_dtype in cometrt/kernels/params.py.
struct DownDgradParams : TileList {
  const __nv_bfloat16* z;     // [rows, gate and up, num_columns]
  const float* row_weight;    // [rows]
  __nv_bfloat16* dz;          // as z; may be z: a lane reads a vector before it writes there
  __nv_bfloat16* weighted_a;  // [rows, num_columns]
  float* dweight;             // [rows, N-tiles]: partial sums over the columns of an N-tile
  int num_columns, num_inner_blocks;

  static constexpr bool kMayBeEmpty = false;

  __device__ int num_k_blocks(const WorkTile&) const { return num_inner_blocks; }
  __device__ KBlocks k_blocks(const WorkTile&) const { return {}; }
};

// A warp's rows of a tile: their first elements, and how many rows and columns exist from there on.
struct RowsOfTile {
  __nv_bfloat16 *weighted_a, *dz;
  const __nv_bfloat16* z;
  int columns, rows;       // columns 0: there is no tile
  int row, dweight_index;  // number of the first row, and its element of dweight
};

// The state of one warp's epilogue, which lies in shared memory to save registers. kZStages: number
// of steps whose z is loaded ahead.
template <int kZStages>
struct RowStage {
  int4 z[kZStages][2][32];  // [gate, up][lane]
  RowsOfTile tiles[2];      // the stashed tile; the tile that is being multiplied
  float2 factors[16];       // of each row: the inverse of its scale, and its router weight
  float dots[32];           // of each lane: <da', a> of its row in the step before the last one
};

template <int kZStages>
struct DownDgradShared {
  Shared gemm;
  RowStage<kZStages> rows[4 * kWarpgroups];  // one per multiplying warp
};

}  // namespace cometrt
