// A warpgroup multiplies its 64 rows of each tile, as slots fill, and hands them to the epilogue.
#pragma once

#include "gemm/turns.cuh"
#include "hopper/wgmma.cuh"

namespace cometrt {

constexpr u32 kReleasesOfSlot = kClusterSize * kWarpgroups * 4;  // each warp of each CTA

// This warp reads the slot no more: in both CTAs, since either may load for both.
__device__ inline void release_slot(Shared& shared, int slot) {
  const u32 lane = threadIdx.x % 32;
  if (lane < kClusterSize) mbarrier_arrive_at(&shared.empty[slot], lane);
}

// d [64, 256] += a [64, K] b [256, K]^T. A slot is released when the next one's products are under
// way, which is when its own are known to be complete.
__device__ inline void multiply(Shared& shared, Cursor& at, int num_k_blocks, int warpgroup,
                                float (&d)[128]) {
  int last = 0;
  for (int k = 0; k < num_k_blocks; ++k, at.advance()) {
    mbarrier_wait(&shared.full[at.slot], at.phase);
    const u64 a = wgmma_descriptor(shared.slots[at.slot].a[warpgroup]);
    const u64 b = wgmma_descriptor(shared.slots[at.slot].b);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < BLOCK_K / 16; ++step) {
      wgmma_m64n256k16(d, a + 2 * step, b + 2 * step, 1);
    }
    wgmma_commit();
    if (k > 0) {
      wgmma_wait<1>();
      release_slot(shared, last);
    }
    last = at.slot;
  }
  wgmma_wait<0>();
  release_slot(shared, last);
}

// The slots of a tile of which this warpgroup has no rows.
__device__ inline void pass_by(Shared& shared, Cursor& at, int num_k_blocks) {
  for (int k = 0; k < num_k_blocks; ++k, at.advance()) {
    mbarrier_wait(&shared.full[at.slot], at.phase);
    release_slot(shared, at.slot);
  }
}

template <typename Epilogue>
__device__ inline void consume(Shared& shared, const GemmParams& p, int warpgroup,
                               Epilogue& epilogue) {
  Turns<32> turns(shared);
  Cursor at;
  WorkItem item;
  while (turns.take(item)) {
    float d[128];
#pragma unroll
    for (int i = 0; i < 128; ++i) d[i] = 0;
    if (warpgroup * kHalfM < item.rows) {
      multiply(shared, at, p.num_k_blocks, warpgroup, d);
    } else {
      pass_by(shared, at, p.num_k_blocks);  // pads are results too: zeros
    }
    if (item.tile >= 0) epilogue.store(item, d);
  }
  epilogue.finish();
}

}  // namespace cometrt
