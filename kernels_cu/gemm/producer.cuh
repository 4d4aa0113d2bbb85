// One thread of a CTA loads the operands of each work tile, a stage of BLOCK_K columns at a time.
#pragma once

#include "gemm/operands.cuh"
#include "gemm/tile_scheduler.cuh"

namespace cometrt {

// Where nothing has to arrive before a tile can be loaded.
struct AlwaysReady {
  __device__ void wait(const WorkTile&) {}
};

// `ready.wait(tile)`: until the tile's operands are in place.
template <typename Params, typename Operands, typename TileReady>
__device__ inline void produce(Shared& shared, const Params& p, const Operands& operands,
                               TileReady& ready) {
  TileScheduler<1> scheduler(shared);
  StageState at;
  WorkTile tile;
  while (scheduler.next(tile)) {
    const bool idle = tile.m_tile < 0;
    const u32 bytes = operands.a_bytes(tile) + sizeof(Stage::b);
    if (!idle) ready.wait(tile);
    const int num_k_blocks = p.num_k_blocks(tile), first = p.first_k(tile);
    for (int k = 0; k < num_k_blocks; ++k, at.advance()) {
      u64* full = &shared.full[at.stage];
      mbarrier_wait(&shared.empty[at.stage], at.parity ^ 1);
      if (idle) {
        mbarrier_arrive(full);
      } else {
        mbarrier_arrive_expect(full, bytes);
        operands.load(shared.stages[at.stage], full, tile, first + k * BLOCK_K);
      }
    }
  }
}

}  // namespace cometrt
