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

// The products of one slot: d [64, 256] += a [64, 64] b [256, 64]^T, or = where it is the first.
__device__ inline void multiply_slot(Shared& shared, const Cursor& at, int warpgroup, bool first,
                                     float (&d)[128]) {
  mbarrier_wait(&shared.full[at.slot], at.phase);
  const u64 a = wgmma_descriptor(shared.slots[at.slot].a[warpgroup]);
  const u64 b = wgmma_descriptor(shared.slots[at.slot].b);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < BLOCK_K / 16; ++step) {
    wgmma_m64n256k16(d, a + 2 * step, b + 2 * step, !first || step > 0);
  }
  wgmma_commit();
}

// d [64, 256] = a [64, K] b [256, K]^T, while the last tile's pieces leave. A slot is released
// when the next one's products are under way, which is when its own are known to be complete.
template <typename Epilogue>
__device__ inline void multiply(Shared& shared, Cursor& at, int num_k_blocks, int warpgroup,
                                float (&d)[128], Epilogue& epilogue) {
  int last = at.slot;
  const auto next = [&](bool first) {
    multiply_slot(shared, at, warpgroup, first, d);
    if (!first) {
      wgmma_wait<1>();
      release_slot(shared, last);
    }
    last = at.slot;
    at.advance();
  };
  if (num_k_blocks > Epilogue::kPieces) {
#pragma unroll
    for (int k = 0; k < Epilogue::kPieces; ++k) {
      next(k == 0);
      epilogue.store(k);
    }
    for (int k = Epilogue::kPieces; k < num_k_blocks; ++k) next(false);
  } else {
    epilogue.store_all();
    next(true);
    for (int k = 1; k < num_k_blocks; ++k) next(false);
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
    if (warpgroup * kHalfM < item.rows) {
      float d[128];
      multiply(shared, at, p.num_k_blocks, warpgroup, d, epilogue);
      epilogue.keep(item, d);
    } else {
      epilogue.store_all();
      pass_by(shared, at, p.num_k_blocks);
      epilogue.keep_zeros(item);
    }
  }
  epilogue.store_all();
}

}  // namespace cometrt
