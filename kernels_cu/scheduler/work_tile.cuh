// Tile sizes and the work tile, the unit of a GEMM's work list. scheduler/tile_order.cuh writes the
// list and gemm/tile_scheduler.cuh pops it. The two CTAs of a cluster compute neighbouring tiles
// that share one operand: each CTA loads half of it and multicasts it to both.
#pragma once

#include "hopper/memory.cuh"

namespace cometrt {

// COMETRT_ macros come from cometrt/kernels/constants.py.
// N_TILE: columns of a tile. Kernels for small batches have half as many.
#ifndef N_TILE
#define N_TILE COMETRT_BLOCK_N
#endif
constexpr int BLOCK_M = COMETRT_BLOCK_M, BLOCK_N = N_TILE, BLOCK_K = COMETRT_BLOCK_K;
constexpr int kClusterSize = COMETRT_CLUSTER_SIZE;

// What a CTA loads of an operand: nothing, one half that it multicasts to both CTAs, or both halves
// for itself alone.
enum Half : u32 { kNoHalf, kFirstHalf, kSecondHalf, kBothHalves };

// One CTA's tile in a cluster step; a step has kClusterSize of them. Mirrored by work_tile_dtype in
// cometrt/plan/tile_order.py.
struct WorkTile {
  int m_tile;  // -1: this CTA is idle in a step of its neighbour
  int n_tile;
  int expert;
  u16 rows;    // of the M-tile, without padding rows
  u16 packed;  // bits 0-1: Half of A; bits 2-3: Half of B; from bit 4: problem

  __device__ u32 a() const { return packed & 3; }
  __device__ u32 b() const { return packed >> 2 & 3; }
  __device__ u32 kind() const { return packed >> 4; }
};

}  // namespace cometrt
