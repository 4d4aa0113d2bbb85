// One thread loads: for each tile, BLOCK_K columns of K at a time, a slot each.
#pragma once

#include "gemm/turns.cuh"

namespace cometrt {

// What a tile reads of K columns [c0, c0 + BLOCK_K). Coordinates innermost first.
struct Operands {
  const TensorMap *a, *a_half, *b;  // boxes of BLOCK_M rows, kHalfM rows, kHalfN columns
  // Weights are read again by the next M-tiles of their expert, rows by nobody for long.
  u64 a_policy, b_policy;

  __device__ Operands(const TensorMap& a, const TensorMap& a_half, const TensorMap& b)
      : a(&a),
        a_half(&a_half),
        b(&b),
        a_policy(cache_policy<Keep::kNormal>()),
        b_policy(cache_policy<Keep::kLong>()) {}
};

// This CTA's part of what the tile reads.
template <bool kGated>
__device__ inline void load_slot(Slot& slot, u64* full, const Operands& maps, const WorkItem& item,
                                 int c0) {
  const int row = item.tile * BLOCK_M;
  if (item.a() == kLoadsAll) {
    const TensorMap* map = item.rows > kHalfM ? maps.a : maps.a_half;
    tensor_load_4d(slot.a, map, c0, row, 0, 0, full, maps.a_policy);
  } else if (item.a() != kLoadsNone) {
    const int half = item.a() - kLoadsFirst;
    tensor_load_4d_multicast(slot.a[half], maps.a_half, c0, row + half * kHalfM, 0, 0, full, 0b11,
                             maps.a_policy);
  }
  const auto column = [&](int half) {
    return kGated ? item.column * kHalfN : item.column * BLOCK_N + half * kHalfN;
  };
  if (item.b() == kLoadsAll) {
    for (int half = 0; half < 2; ++half) {
      tensor_load_4d(slot.b[half], maps.b, c0, column(half), kGated ? half : 0, item.expert, full,
                     maps.b_policy);
    }
  } else {
    const int half = item.b() - kLoadsFirst;
    tensor_load_4d_multicast(slot.b[half], maps.b, c0, column(half), kGated ? half : 0, item.expert,
                             full, 0b11, maps.b_policy);
  }
}

// `kGated`: an N-tile is 128 gate columns and the up columns that belong to them.
template <bool kGated, typename Hooks>
__device__ inline void produce(Shared& shared, const GemmParams& p, const Operands& maps,
                               const Hooks& hooks) {
  Turns<1> turns(shared);
  Cursor at;
  WorkItem item;
  while (turns.take(item)) {
    const bool idle = item.tile < 0;
    const u32 a_bytes = item.rows > kHalfM ? sizeof(Slot::a) : sizeof(Slot::a) / 2;
    if (!idle) hooks.before_loads(item);
    for (int k = 0; k < p.num_k_blocks; ++k, at.advance()) {
      u64* full = &shared.full[at.slot];
      mbarrier_wait(&shared.empty[at.slot], at.phase ^ 1);
      if (idle) {
        mbarrier_arrive(full);
      } else {
        mbarrier_arrive_expect(full, a_bytes + sizeof(Slot::b));
        load_slot<kGated>(shared.slots[at.slot], full, maps, item, k * BLOCK_K);
      }
    }
  }
}

}  // namespace cometrt
