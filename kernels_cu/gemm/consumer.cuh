// The consumer: a warpgroup multiplies its 64 rows of each work tile, stage by stage, and passes
// the accumulators to the epilogue. It waits for Shared::full (the producers) and arrives on
// Shared::empty of both CTAs.
#pragma once

#include "common/trace.cuh"
#include "gemm/operands.cuh"
#include "gemm/tile_scheduler.cuh"

namespace cometrt {

constexpr int kMaxKBlocksPerStep = 4;  // K blocks between two epilogue steps

// By a warp that has read the stage: arrives on `empty` of both CTAs, since either may multicast
// into both.
__device__ inline void release_stage(Shared& shared, int stage) {
  const u32 lane = threadIdx.x % 32;
  if (lane < kClusterSize) mbarrier_arrive_at(&shared.empty[stage], lane);
}

// Issues the wgmma of one stage for a warpgroup. `first`: they overwrite d, otherwise they add to
// it.
template <typename Operands>
__device__ inline void issue_stage(const Stage& stage, int warpgroup, bool first,
                                   float (&d)[kAccumulators]) {
  const u64 a = Operands::a_descriptor(stage, warpgroup), b = Operands::b_descriptor(stage);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < BLOCK_K / 16; ++step) {
    wgmma_m64k16<Operands::kMajorA, Operands::kMajorB>(
        d, a + Operands::kStepA * step, b + Operands::kStepB * step, !first || step > 0);
  }
  wgmma_commit();
}

// d [64, BLOCK_N] += a [64, BLOCK_K] b [BLOCK_N, BLOCK_K]^T. The first stage of a tile overwrites
// d. Where the operand policy depends on it (kByKind), `kind` is the work tile's kind.
template <typename Operands>
__device__ inline void multiply_stage(Shared& shared, const StageState& state, u32 kind,
                                      int warpgroup, bool first, float (&d)[kAccumulators]) {
  mbarrier_wait(&shared.full[state.stage], state.parity);
  const Stage& stage = shared.stages[state.stage];
  if constexpr (!Operands::kByKind) {
    issue_stage<Operands>(stage, warpgroup, first, d);
  } else if (kind == 0) {
    issue_stage<typename Operands::OfFirstKind>(stage, warpgroup, first, d);
  } else {
    issue_stage<typename Operands::OfOtherKinds>(stage, warpgroup, first, d);
  }
}

// d [64, BLOCK_N] = a [64, K] b [BLOCK_N, K]^T. Meanwhile the epilogue stores the previous tile,
// one step every few K blocks. A stage is released after the next stage's wgmma are issued and its
// own are complete. Returns the last stage, whose wgmma still run and which the caller releases.
template <typename Operands, typename Epilogue>
__device__ inline int multiply(Shared& shared, StageState& state, u32 kind, int num_k_blocks,
                               int warpgroup, float (&d)[kAccumulators], Epilogue& epilogue) {
  int last = state.stage;
  const auto next = [&](bool first) {
    multiply_stage<Operands>(shared, state, kind, warpgroup, first, d);
    if (!first) {
      wgmma_wait<1>();
      release_stage(shared, last);
    }
    last = state.stage;
    state.advance();
  };
  int k = 0;
  if (num_k_blocks >= Epilogue::kSteps) {
    const int every = min(num_k_blocks / Epilogue::kSteps, kMaxKBlocksPerStep);
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

// Releases the stages of a tile unread. For tiles of which this warpgroup computes no rows.
__device__ inline void skip_tile(Shared& shared, StageState& state, int num_k_blocks) {
  for (int k = 0; k < num_k_blocks; ++k, state.advance()) {
    mbarrier_wait(&shared.full[state.stage], state.parity);
    release_stage(shared, state.stage);
  }
}

// The main loop of a multiplying warpgroup over all work tiles of its CTA.
template <typename Operands, typename Params, typename Epilogue>
__device__ inline void consume(Shared& shared, const Params& p, int warpgroup, Epilogue& epilogue,
                               Recorder recorder = {}) {
  TileScheduler<32> scheduler(shared);
  StageState state;
  WorkTile tile, next;
  for (bool more = scheduler.next(tile); more; tile = next) {
    epilogue.expect(tile);
    const int num_k_blocks = p.num_k_blocks(tile);
    const bool is_empty = Params::kMayBeEmpty && num_k_blocks == 0;
    if (warpgroup * kHalfM < tile.rows && !is_empty) {
      float d[kAccumulators];
      // The traced event begins when the first stage is full.
      if (Recorder::kOn) mbarrier_wait(&shared.full[state.stage], state.parity);
      recorder.begin_tile(tile.m_tile, tile.n_tile);
      const int last =
          multiply<Operands>(shared, state, tile.kind(), num_k_blocks, warpgroup, d, epilogue);
      more = scheduler.next(next);
      wgmma_wait<0>();
      release_stage(shared, last);
      recorder.end_tile(Operands::kByKind && tile.kind() > 0);
      epilogue.stash(tile, d);
    } else {
      epilogue.flush();
      skip_tile(shared, state, num_k_blocks);
      epilogue.stash_zeros(tile);
      more = scheduler.next(next);
    }
  }
  epilogue.flush();
}

}  // namespace cometrt
