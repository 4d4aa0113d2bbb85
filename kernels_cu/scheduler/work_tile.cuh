// What a cluster computes at a time. Two CTAs form a cluster and take neighbouring tiles, so that
// they have one operand in common: each loads half of it, for both.
#pragma once

#include "hopper/memory.cuh"

namespace cometrt {

// From cometrt/kernels/constants.py, as all COMETRT_ macros.
constexpr int BLOCK_M = COMETRT_BLOCK_M, BLOCK_N = COMETRT_BLOCK_N, BLOCK_K = COMETRT_BLOCK_K;
constexpr int kClusterSize = COMETRT_CLUSTER_SIZE;

// What a CTA loads of an operand: one multicast half for both CTAs, or both halves for itself
// alone.
enum Half : u32 { kNoHalf, kFirstHalf, kSecondHalf, kBothHalves };

// One CTA's tile. scheduler/tile_order.cuh writes a list of them, two for each step of a cluster.
// Mirrored by work_item_dtype in cometrt/plan/turns.py.
struct WorkTile {
  int m_tile;  // -1: this CTA has nothing to do, while its neighbour has
  int n_tile;
  int expert;
  u16 rows;    // of the M-tile, without padding
  u16 packed;  // Half of A in bits 0 and 1, of B in bits 2 and 3; its problem from bit 4 on

  __device__ u32 a() const { return packed & 3; }
  __device__ u32 b() const { return packed >> 2 & 3; }
  __device__ u32 kind() const { return packed >> 4; }
};

}  // namespace cometrt
