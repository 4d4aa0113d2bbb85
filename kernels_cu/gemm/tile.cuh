// What a CTA multiplies at a time, and the shared memory that this takes.
//
//   out[rows of an M-tile, columns of an N-tile] = a[rows, :] b[expert, columns, :]^T
//
// The CTAs of a cluster take neighbouring tiles, so that they read operands in common: one loads
// half of it, another the other half, for all that read it. Macro: CLUSTER, 2 or 4.
#pragma once

#include <cuda_bf16.h>

#include "hopper/memory.cuh"

namespace cometrt {

constexpr int BLOCK_M = 128, BLOCK_N = 256, BLOCK_K = 64;
constexpr int kWarpgroups = 2;  // that multiply: each has 64 rows of the tile, and all columns
constexpr int kHalfM = BLOCK_M / kWarpgroups, kHalfN = BLOCK_N / 2;
#ifndef CLUSTER
#define CLUSTER 2
#endif
constexpr int kStages = 4, kClusterSize = CLUSTER;
constexpr int kThreads = 128 * (1 + kWarpgroups);  // the first warpgroup loads
constexpr int kSlabRows = 8, kSlabColumns = 64;
constexpr int kTurnsAhead = 2;
constexpr int kMoverWarps = 2;  // of the first warpgroup, in the fused kernels: they move rows

// What a CTA loads of an operand: of its two halves none, one or both, for which CTAs.
struct Load {
  u32 bits;

  __device__ u16 ctas() const { return bits & 0xf; }  // one bit each
  __device__ u32 halves() const { return bits >> 4 & 3; }
};

// One CTA's tile; a list of them, kClusterSize for each turn of a cluster, is written by schedule/.
// Mirrored by work_item_dtype in cometrt/plan/turns.py.
struct WorkItem {
  int tile;    // M-tile; -1: nothing to do, while a neighbour has
  int column;  // N-tile
  int expert;
  u16 rows;   // of the M-tile that are not padding
  u16 loads;  // 6 bits for A, 6 for B

  __device__ Load a() const { return {loads & 0x3fu}; }
  __device__ Load b() const { return {loads >> 6 & 0x3fu}; }
};

// Mirrored by gemm_params.
struct GemmParams {
  const WorkItem* items;  // [*num_turns, kClusterSize]
  const int* num_turns;
  int* progress;       // [2]: turns dealt, clusters that have finished; both 0 between launches
  __nv_bfloat16* out;  // [rows, num_columns]
  __nv_bfloat16* z;    // [rows, gate and up, num_columns], where it is written
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
