// A warpgroup multiplies its 64 rows of each tile, as slots fill, and hands them to the epilogue.
#pragma once

#include "common/trace.cuh"
#include "gemm/turns.cuh"
#include "hopper/wgmma.cuh"

namespace cometrt {

constexpr int kMaxBlocksOfPiece = 4;

// This warp reads the slot no more: in both CTAs, since either may load for both.
__device__ inline void release_slot(Shared& shared, int slot) {
  const u32 lane = threadIdx.x % 32;
  if (lane < kClusterSize) mbarrier_arrive_at(&shared.empty[slot], lane);
}

// The products of one slot: d [64, 256] += a [64, BLOCK_K] b [256, BLOCK_K]^T, or = where it is the
// first.
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
// when the next one's products are under way, which is when its own are known to be complete; the
// last slot's are still under way at the end. Returns that slot.
template <typename Epilogue>
__device__ inline int multiply(Shared& shared, Cursor& at, int num_k_blocks, int warpgroup,
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
  int k = 0;
  if (num_k_blocks >= Epilogue::kPieces) {
    const int every = min(num_k_blocks / Epilogue::kPieces, kMaxBlocksOfPiece);
#pragma unroll
    for (int piece = 0; piece < Epilogue::kPieces; ++piece) {
      next(piece == 0);
      epilogue.leave(piece);
      for (int i = 1; i < every; ++i) next(false);
    }
    k = every * Epilogue::kPieces;
  } else {
    epilogue.leave_at_once();
    next(true);
    k = 1;
  }
  for (; k < num_k_blocks; ++k) next(false);
  return last;
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
                               Epilogue& epilogue, Recorder recorder = {}) {
  Turns<32> turns(shared);
  Cursor at;
  WorkItem item, next;
  for (bool more = turns.take(item); more; item = next) {
    if (warpgroup * kHalfM < item.rows) {
      float d[128];
      if (Recorder::kOn) mbarrier_wait(&shared.full[at.slot], at.phase);  // then the work begins
      recorder.begin();
      const int last = multiply(shared, at, p.num_k_blocks, warpgroup, d, epilogue);
      more = turns.take(next);
      wgmma_wait<0>();
      release_slot(shared, last);
      recorder.end(item.tile, item.column);
      epilogue.keep(item, d);
    } else {
      epilogue.leave_at_once();
      pass_by(shared, at, p.num_k_blocks);
      epilogue.keep_zeros(item);
      more = turns.take(next);
    }
  }
  epilogue.leave_at_once();
}

}  // namespace cometrt
