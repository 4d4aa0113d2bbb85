// One thread loads: for each tile, 64 columns of K at a time, a slot each.
#pragma once

#include "gemm/turns.cuh"

namespace cometrt {

// One of the two halves of an operand's share of a slot. Where both CTAs want it, CTA `half` loads
// it for both. Coordinates innermost first.
__device__ inline void load_half(bool shared_by_both, u32 cta, u32 half, void* to,
                                 const TensorMap* map, int c0, int c1, int c2, int c3, u64* full) {
  if (!shared_by_both) {
    tensor_load_4d(to, map, c0, c1, c2, c3, full);
  } else if (half == cta) {
    tensor_load_4d_multicast(to, map, c0, c1, c2, c3, full, 0b11);
  }
}

// `kGated`: an N-tile is 128 gate columns and the up columns that belong to them.
template <bool kGated, typename Hooks>
__device__ inline void produce(Shared& shared, const GemmParams& p, const TensorMap* a_map,
                               const TensorMap* b_map, u32 cta, const Hooks& hooks) {
  Turns<1> turns(shared);
  Cursor at;
  WorkItem item;
  while (turns.take(item)) {
    const bool idle = item.tile < 0;
    const bool both_halves = item.rows > kHalfM;
    const bool share_a = item.sharing == kSharesA, share_b = item.sharing == kSharesB;
    const u32 a_bytes = (both_halves ? 2 : 1) * sizeof(Slot::a[0]), b_bytes = sizeof(Slot::b);
    if (!idle) hooks.before_loads(item);
    for (int k = 0; k < p.num_k_blocks; ++k, at.advance()) {
      Slot& slot = shared.slots[at.slot];
      u64* full = &shared.full[at.slot];
      mbarrier_wait(&shared.empty[at.slot], at.phase ^ 1);
      if (idle) {
        mbarrier_arrive(full);
        continue;
      }
      mbarrier_arrive_expect(full, a_bytes + b_bytes);
      for (u32 half = 0; half < (both_halves ? 2 : 1); ++half) {
        const int row = item.tile * BLOCK_M + half * kHalfM;
        load_half(share_a, cta, half, slot.a[half], a_map, k * BLOCK_K, row, 0, 0, full);
      }
      for (u32 half = 0; half < 2; ++half) {
        const int column = kGated ? item.column * kHalfN : item.column * BLOCK_N + half * kHalfN;
        load_half(share_b, cta, half, slot.b[half], b_map, k * BLOCK_K, column, kGated ? half : 0,
                  item.expert, full);
      }
    }
  }
}

}  // namespace cometrt
