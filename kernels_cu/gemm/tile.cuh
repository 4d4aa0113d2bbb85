// The grouped GEMM engine: constants, kernel parameters and the shared memory of a CTA.
//
//   out[rows of an M-tile, columns of an N-tile] = a[rows, :] b[expert, columns, :]^T
//
// Included by every part of the engine. The mbarriers in Shared synchronise the cluster's warps.
#pragma once

#include <cuda_bf16.h>

#include "scheduler/work_tile.cuh"

namespace cometrt {

constexpr int kWarpgroups = 2;  // multiply; each computes 64 rows and all columns of a tile
constexpr int kHalfM = BLOCK_M / kWarpgroups, kHalfN = BLOCK_N / 2;
constexpr int kAccumulators = BLOCK_N / 2;  // of a multiplying thread
static_assert(BLOCK_N == 256 || BLOCK_N == 128, "wgmma_m64k16 has these widths");
#ifndef GEMM_STAGES
#define GEMM_STAGES (BLOCK_N == 256 ? 4 : 6)
#endif
constexpr int kStages = GEMM_STAGES;               // of operands: 48 KB each, or 32 KB
constexpr int kThreads = 128 * (1 + kWarpgroups);  // warpgroup 0 loads, schedules, communicates
constexpr int kSubtileRows = 8, kSubtileColumns = 64;
constexpr u32 kMaxSharedBytes = 227 * 1024;  // that a CTA may have
constexpr int kSchedulerStages = 2;  // work tiles in flight between the scheduler and its readers

// The work tiles of a launch, in their order.
struct TileList {
  const WorkTile* work_tiles;  // [*num_steps, kClusterSize]
  const int* num_steps;
  int* progress;  // [2]: cluster steps popped, clusters finished; both 0 between launches
  const u32* ok;  // null, or ExchangeState::ok: while 0 the list is incomplete and no tile runs
};

// The K blocks of a work tile, whose K lies in one piece.
struct KBlocks {
  // Where K block k begins. From one call to the next, k does not fall.
  __device__ int first(int k) const { return k * BLOCK_K; }
};

// One of the GEMMs that a launch computes. A work tile names its problem (WorkTile::kind).
struct Problem {
  __nv_bfloat16* out;  // [rows, num_columns]
  __nv_bfloat16* z;    // [rows, gate and up, num_columns]; null if the kernel stores no z
  int num_k_blocks, num_columns;
};

// GEMMs over rows: K is the same for all tiles of a problem. Mirrored by gemm_params_dtype of
// cometrt/kernels/params.py.
struct GemmParams : TileList {
  Problem problems[1];
  // With few rows each weight is read once. Kept in L2, weights would evict all else from it.
  int reads_weights_once, unused;

  static constexpr bool kMayBeEmpty = false;  // whether a tile may have no K blocks at all

  __device__ const Problem& problem_of(const WorkTile& tile) const {
    constexpr int kNumProblems = sizeof(problems) / sizeof(Problem);
    return problems[kNumProblems == 1 ? 0 : tile.kind()];
  }
  __device__ int num_k_blocks(const WorkTile& tile) const { return problem_of(tile).num_k_blocks; }
  __device__ KBlocks k_blocks(const WorkTile&) const { return {}; }
};

// One pipeline stage: BLOCK_K columns of both operands. Rows of 128 bytes, in the 128-byte swizzle.
struct Stage {
  __nv_bfloat16 a[2][kHalfM * BLOCK_K];
  __nv_bfloat16 b[2][kHalfN * BLOCK_K];  // gated: gate columns, then their up columns
};

// A warp's staging buffer from the accumulator layout to rows. Rows of 128 bytes, swizzled.
struct EpilogueTile {
  __nv_bfloat16 values[kSubtileRows * kSubtileColumns];
};

struct Shared {
  Stage stages[kStages];
  EpilogueTile epilogue_tiles[4 * kWarpgroups];  // one per multiplying warp
  WorkTile work_tiles[kSchedulerStages];
  u64 full[kStages];                     // the stage holds this CTA's next BLOCK_K columns
  u64 empty[kStages];                    // all multiplying warps of the cluster have read the stage
  u64 scheduler_full[kSchedulerStages];  // this CTA's work tile has arrived
  u64 scheduler_empty[kSchedulerStages];  // in CTA 0: all readers of the cluster have read it
};
static_assert(sizeof(Shared) <= kMaxSharedBytes, "shared memory of a CTA");

// Stage and parity of a thread in a pipeline of kCount stages. The parity flips when it wraps.
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
