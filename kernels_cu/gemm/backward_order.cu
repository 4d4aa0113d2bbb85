// The tile orders of all GEMMs of a backward in the modes "sequential" and "chunked". They are made
// from the plan in `saved`, which has no work tiles.
#include "gemm/wgrad_order.cuh"
#include "scheduler/tile_order.cuh"

using namespace cometrt;

namespace {

constexpr int kOrderThreads = 1024;

}  // namespace

// Any grid. Does nothing where the plan is not valid: `wgrads.ok` points to 0. recompute: of the up
// GEMM, where the backward computes z again; else no pipeline chunk, so nothing is written.
extern "C" __global__ void __launch_bounds__(kOrderThreads, 1)
    backward_order(const __grid_constant__ PlannedTiles tiles,
                   const __grid_constant__ TileOrderParams recompute,
                   const __grid_constant__ TileOrderParams down_dgrad,
                   const __grid_constant__ TileOrderParams up_dgrad,
                   const __grid_constant__ WgradParams wgrads) {
  __shared__ int warps[kOrderThreads / 32];
  __shared__ PlacedRun placed[kOrderThreads];
  const auto team = Team<kOrderThreads>::of_block(warps);
  if (!*wgrads.ok) return;
  write_tile_order(recompute, tiles, team, blockIdx.x, gridDim.x, placed);
  write_tile_order(down_dgrad, tiles, team, blockIdx.x, gridDim.x, placed);
  write_tile_order(up_dgrad, tiles, team, blockIdx.x, gridDim.x, placed);
  write_wgrad_order(wgrads, const_cast<WorkTile*>(wgrads.work_tiles),
                    const_cast<int*>(wgrads.num_steps), wgrads.progress);
}
