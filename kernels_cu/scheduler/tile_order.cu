// Writes the tile order of a GEMM in a launch of its own, for GEMMs outside a layer. In a layer
// `prepare` does it.
#include "scheduler/tile_order.cuh"

using namespace cometrt;

constexpr int kThreads = 1024;

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    tile_order(const __grid_constant__ TileOrderParams p,
               const __grid_constant__ PlannedTiles tiles) {
  __shared__ int warps[kThreads / 32];
  __shared__ PlacedRun placed[kThreads];
  const auto team = Team<kThreads>::of_block(warps);
  write_tile_order(p, tiles, team, blockIdx.x, gridDim.x, placed);
}
