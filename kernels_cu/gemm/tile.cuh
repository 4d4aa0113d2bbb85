// The grouped GEMM engine: its parameters and its shared memory.
//
//   out[rows of an M-tile, columns of an N-tile] = a[rows, :] b[expert, columns, :]^T
#pragma once

#include <cuda_bf16.h>

#include "scheduler/work_tile.cuh"

namespace cometrt {

constexpr int kWarpgroups = 2;  // that multiply: each has 64 rows of the tile, and all columns
constexpr int kHalfM = BLOCK_M / kWarpgroups, kHalfN = BLOCK_N / 2;
constexpr int kStages = 4;
constexpr int kThreads = 128 * (1 + kWarpgroups);  // the first warpgroup does not multiply
constexpr int kSubtileRows = 8, kSubtileColumns = 64;
constexpr int kSchedulerStages = 2;

// The work tiles of a launch, in their order.
struct TileList {
  const WorkTile* work_tiles;  // [*num_steps, kClusterSize]
  const int* num_steps;
  int* progress;  // [2]: cluster steps scheduled, clusters finished; both 0 between launches
  const u32* ok;  // where it points to 0, the list is not complete: nothing is done; may be null
};

// One of the GEMMs that a launch computes; a work tile's kind says which.
struct Problem {
  __nv_bfloat16* out;  // [rows, num_columns]
  __nv_bfloat16* z;    // [rows, gate and up, num_columns], where it is written
  int num_k_blocks, num_columns;
};

// GEMMs over rows: K is the same for all tiles of a problem. Mirrored by gemm_params.
struct GemmParams : TileList {
  Problem problems[1];

  static constexpr bool kMayBeEmpty = false;  // whether a tile may have no K blocks at all

  __device__ const Problem& problem_of(const WorkTile& tile) const {
    constexpr int kNumProblems = sizeof(problems) / sizeof(Problem);
    return problems[kNumProblems == 1 ? 0 : tile.kind()];
  }
  __device__ int num_k_blocks(const WorkTile& tile) const { return problem_of(tile).num_k_blocks; }
  __device__ int first_k(const WorkTile&) const { return 0; }
};

// BLOCK_K columns of both operands. Rows of 128 bytes, with the 128-byte swizzle.
struct Stage {
  __nv_bfloat16 a[2][kHalfM * BLOCK_K];
  __nv_bfloat16 b[2][kHalfN * BLOCK_K];  // gated: gate rows, then the up rows that belong to them
};

// Where a warp turns its results from the accumulators' layout into rows. Rows of 128 bytes,
// swizzled.
struct EpilogueTile {
  __nv_bfloat16 values[kSubtileRows * kSubtileColumns];
};

struct Shared {
  Stage stages[kStages];
  EpilogueTile epilogue_tiles[4 * kWarpgroups];  // of each warp that multiplies
  WorkTile work_tiles[kSchedulerStages];
  u64 full[kStages];                      // the stage holds this CTA's next BLOCK_K columns
  u64 empty[kStages];                     // all warps of the cluster have read this stage
  u64 scheduler_full[kSchedulerStages];   // this CTA's work tile is there
  u64 scheduler_empty[kSchedulerStages];  // of the first CTA: all warps of the cluster have read it
};
static_assert(sizeof(Shared) <= 227 * 1024, "shared memory of an SM");

// A place in a ring of kCount stages. The parity flips with each round.
template <int kCount>
struct PipelineState {
  int stage = 0;
  u32 parity = 0;

  __device__ void advance() {
    if (++stage == kCount) stage = 0, parity ^= 1;
  }
};
using StageState = PipelineState<kStages>;

}  // namespace cometrt
