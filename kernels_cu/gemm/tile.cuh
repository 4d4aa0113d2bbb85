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
constexpr int kSlabColumns = 64, kSlabsInFlight = 2;

enum Sharing : u16 { kSharesNothing, kSharesA, kSharesB };

// One CTA's tile; a list of them, two for each turn of a cluster, is written by schedule/. Mirrored
// by work_item_dtype in cometrt/kernels/params.py.
struct WorkItem {
  int tile;    // M-tile; -1: nothing to do, while the neighbour has
  int column;  // N-tile
  int expert;
  u16 rows;     // of the M-tile that are not padding
  u16 sharing;  // which operand is the neighbour's too; equal in both items of a turn
};

// Mirrored by gemm_params.
struct GemmParams {
  const WorkItem* items;  // [*num_turns, kClusterSize]
  const int* num_turns;
  int num_k_blocks, unused;
};

struct Slot {
  __nv_bfloat16 a[2][kHalfM * BLOCK_K];  // 128-byte rows, swizzled
  __nv_bfloat16 b[2][kHalfN * BLOCK_K];  // gated: gate rows, then the up rows that belong to them
};

struct Shared {
  Slot slots[kStages];
  __nv_bfloat16 slabs[kWarpgroups][kSlabsInFlight][kHalfM * kSlabColumns];  // of results
  u64 full[kStages];   // this CTA's slot holds its tile's next 64 columns of K
  u64 empty[kStages];  // all warps of the cluster have done with this slot
};
static_assert(sizeof(Shared) <= 227 * 1024, "shared memory of an SM");

// Walks the slots; the phase bit flips with each round.
struct Cursor {
  int slot = 0;
  u32 phase = 0;

  __device__ void advance() {
    if (++slot == kStages) slot = 0, phase ^= 1;
  }
};

// This CTA's turns, one after the other; the next is read ahead.
class Turns {
 public:
  __device__ Turns(const GemmParams& p, u32 cta)
      : items_(p.items + cta), num_turns_(*p.num_turns), turn_(blockIdx.x / kClusterSize) {
    fetch();
  }
  __device__ bool take(WorkItem& item) {
    if (turn_ >= num_turns_) return false;
    item = next_;
    turn_ += gridDim.x / kClusterSize;
    fetch();
    return true;
  }

 private:
  __device__ void fetch() {
    if (turn_ >= num_turns_) return;
    const int4 raw = *reinterpret_cast<const int4*>(items_ + static_cast<long long>(turn_) * 2);
    next_ = {raw.x, raw.y, raw.z, static_cast<u16>(raw.w), static_cast<u16>(raw.w >> 16)};
  }

  const WorkItem* items_;
  int num_turns_, turn_;
  WorkItem next_;
};

}  // namespace cometrt
