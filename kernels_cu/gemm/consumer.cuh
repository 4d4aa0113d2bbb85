// A warpgroup multiplies its 64 rows of each work tile, stage by stage, and hands them to the
// epilogue.
#pragma once

#include "common/trace.cuh"
#include "gemm/operands.cuh"
#include "gemm/tile_scheduler.cuh"

namespace cometrt {

constexpr int kMaxBlocksOfStep = 4;  // K blocks between two steps of the epilogue

// This warp has read the stage. Signals both CTAs, since either may load into both.
__device__ inline void release_stage(Shared& shared, int stage) {
  const u32 lane = threadIdx.x % 32;
  if (lane < kClusterSize) mbarrier_arrive_at(&shared.empty[stage], lane);
}

// d [64, 256] += a [64, BLOCK_K] b [256, BLOCK_K]^T, or = for the first stage of a tile.
template <typename Operands>
__device__ inline void multiply_stage(Shared& shared, const StageState& at, int warpgroup,
                                      bool first, float (&d)[128]) {
  mbarrier_wait(&shared.full[at.stage], at.parity);
  const u64 a = Operands::a_descriptor(shared.stages[at.stage], warpgroup);
  const u64 b = Operands::b_descriptor(shared.stages[at.stage]);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < BLOCK_K / 16; ++step) {
    wgmma_m64n256k16<Operands::kMajorA, Operands::kMajorB>(
        d, a + Operands::kStepA * step, b + Operands::kStepB * step, !first || step > 0);
  }
  wgmma_commit();
}

// d [64, 256] = a [64, K] b [256, K]^T. Meanwhile the epilogue stores the last tile, a step every
// few K blocks. A stage is released when the next stage's products are under way: its own are
// complete then. Returns the last stage, whose products are still under way.
template <typename Operands, typename Epilogue>
__device__ inline int multiply(Shared& shared, StageState& at, int num_k_blocks, int warpgroup,
                               float (&d)[128], Epilogue& epilogue) {
  int last = at.stage;
  const auto next = [&](bool first) {
    multiply_stage<Operands>(shared, at, warpgroup, first, d);
    if (!first) {
      wgmma_wait<1>();
      release_stage(shared, last);
    }
    last = at.stage;
    at.advance();
  };
  int k = 0;
  if (num_k_blocks >= Epilogue::kSteps) {
    const int every = min(num_k_blocks / Epilogue::kSteps, kMaxBlocksOfStep);
#pragma unroll(Epilogue::kUnrolledSteps)
    for (int step = 0; step < Epilogue::kSteps; ++step) {
      next(step == 0);
      epilogue.store_step(step);
      for (int i = 1; i < every; ++i) next(false);
    }
    k = every * Epilogue::kSteps;
  } else {
    epilogue.flush();
    next(true);
    k = 1;
  }
  for (; k < num_k_blocks; ++k) next(false);
  return last;
}

// A tile of which this warpgroup has nothing to multiply: its stages are released unread.
__device__ inline void skip_tile(Shared& shared, StageState& at, int num_k_blocks) {
  for (int k = 0; k < num_k_blocks; ++k, at.advance()) {
    mbarrier_wait(&shared.full[at.stage], at.parity);
    release_stage(shared, at.stage);
  }
}

template <typename Operands, typename Params, typename Epilogue>
__device__ inline void consume(Shared& shared, const Params& p, int warpgroup, Epilogue& epilogue,
                               Recorder recorder = {}) {
  TileScheduler<32> scheduler(shared);
  StageState at;
  WorkTile tile, next;
  for (bool more = scheduler.next(tile); more; tile = next) {
    epilogue.expect(tile);
    const int num_k_blocks = p.num_k_blocks(tile);
    const bool is_empty = Params::kMayBeEmpty && num_k_blocks == 0;
    if (warpgroup * kHalfM < tile.rows && !is_empty) {
      float d[128];
      if (Recorder::kOn) mbarrier_wait(&shared.full[at.stage], at.parity);  // then the work begins
      recorder.begin();
      const int last = multiply<Operands>(shared, at, num_k_blocks, warpgroup, d, epilogue);
      more = scheduler.next(next);
      wgmma_wait<0>();
      release_stage(shared, last);
      recorder.end(tile.m_tile, tile.n_tile);
      epilogue.stash(tile, d);
    } else {
      epilogue.flush();
      skip_tile(shared, at, num_k_blocks);
      epilogue.stash_zeros(tile);
      more = scheduler.next(next);
    }
  }
  epilogue.flush();
}

}  // namespace cometrt
