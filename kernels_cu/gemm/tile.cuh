// What a CTA multiplies at a time, and the shared memory that this takes.
//
//   out[rows of an M-tile, columns of an N-tile] = a[rows, :] b[expert, columns, :]^T
//
// Two CTAs form a cluster and take neighbouring tiles, so that one of their operands is the same:
// each loads half of it, for both.
#pragma once

#include <cuda_bf16.h>

#include "hopper/memory.cuh"

namespace cometrt {

constexpr int BLOCK_M = 128, BLOCK_N = 256, BLOCK_K = 64;
constexpr int kWarpgroups = 2;  // that multiply: each has 64 rows of the tile, and all columns
constexpr int kHalfM = BLOCK_M / kWarpgroups, kHalfN = BLOCK_N / 2;
constexpr int kStages = 4, kClusterSize = 2;
constexpr int kThreads = 128 * (1 + kWarpgroups);  // the first warpgroup loads
constexpr int kSlabRows = 8, kSlabColumns = 64;
constexpr int kTurnsAhead = 2;
constexpr int kMoverWarps = 2;  // of the first warpgroup, in the fused kernels: they move rows

// What a CTA loads of an operand: a half for both CTAs, or all of it for itself.
enum Loads : u32 { kLoadsNone, kLoadsFirst, kLoadsSecond, kLoadsAll };

// One CTA's tile; a list of them, two for each turn of a cluster, is written by schedule/. Mirrored
// by work_item_dtype in cometrt/plan/turns.py.
struct WorkItem {
  int tile;    // M-tile; -1: nothing to do, while the neighbour has
  int column;  // N-tile
  int expert;
  u16 rows;   // of the M-tile that are not padding
  u16 loads;  // Loads of A in bits 0 and 1, of B in 2 and 3

  __device__ u32 a() const { return loads & 3; }
  __device__ u32 b() const { return loads >> 2 & 3; }
};

// Mirrored by gemm_params.
struct GemmParams {
  const WorkItem* items;  // [*num_turns, kClusterSize]
  const int* num_turns;
  int* progress;       // [2]: turns dealt, clusters that have finished; both 0 between launches
  __nv_bfloat16* out;  // [rows, num_columns]
  __nv_bfloat16* z;    // [rows, gate and up, num_columns], where it is written
  const u32* ok;       // 0 there: the list is not complete, there is nothing to do; null: it is
  int num_k_blocks, num_columns;
};

struct Slot {
  __nv_bfloat16 a[2][kHalfM * BLOCK_K];  // 128-byte rows, swizzled
  __nv_bfloat16 b[2][kHalfN * BLOCK_K];  // gated: gate rows, then the up rows that belong to them
};

// Results of a warp on their way out: 128-byte rows, swizzled.
struct Slab {
  __nv_bfloat16 values[kSlabRows * kSlabColumns];
};

struct Shared {
  Slot slots[kStages];
  Slab slabs[4 * kWarpgroups];  // of each warp that multiplies
  WorkItem turns[kTurnsAhead];
  u64 full[kStages];            // this CTA's slot holds its tile's next BLOCK_K columns of K
  u64 empty[kStages];           // all warps of the cluster have done with this slot
  u64 turn_full[kTurnsAhead];   // this CTA's item is there
  u64 turn_empty[kTurnsAhead];  // of the cluster's first CTA: all warps have read theirs
};
static_assert(sizeof(Shared) <= 227 * 1024, "shared memory of an SM");

// Walks a ring of slots; the phase bit flips with each round.
template <int kSlots>
struct Ring {
  int slot = 0;
  u32 phase = 0;

  __device__ void advance() {
    if (++slot == kSlots) slot = 0, phase ^= 1;
  }
};
using Cursor = Ring<kStages>;

}  // namespace cometrt
