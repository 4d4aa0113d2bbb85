// The signal of a tile's results to the combine warps.
#pragma once

#include "gemm/tile.cuh"
#include "protocol/exchange_params.cuh"

namespace cometrt {

constexpr u32 kSignalsPerTile = 4 * kWarpgroups;  // of tile_done: one per multiplying warp

// Signals tile_done once a warp that multiplies has stored its part of a tile: a release at gpu
// scope by lane 0 after __syncwarp. The partner is CombineWarp::wait_addends().
struct TileDoneSignal {
  static constexpr bool kSignals = true;
  const ExchangeParams& params;

  __device__ int flag_of(const WorkTile& tile) const {
    const int n_chunk = tile.n_tile * BLOCK_N / params.n_chunk_columns;
    return tile.m_tile * params.num_n_chunks + n_chunk;
  }
  __device__ void signal(int flag) const {
    __syncwarp();
    if (threadIdx.x % 32 == 0) add_release_gpu(&params.tile_done[flag], 1);
  }
  __device__ void signal(const WorkTile& tile) const { signal(flag_of(tile)); }
};

}  // namespace cometrt
