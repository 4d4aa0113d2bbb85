// Prepares a forward whose plan was made ahead, as `prepare` does one that plans for itself. It
// writes the tile orders of both GEMMs from the plan, zeroes padding rows, and compares the headers
// of all ranks.
#include "plan/padding.cuh"
#include "protocol/agree.cuh"
#include "scheduler/tile_order.cuh"

using namespace cometrt;

namespace {

constexpr int kPrepareThreads = 1024, kWarps = kPrepareThreads / 32;

}  // namespace

// wait_for_previous_kernel().
extern "C" __constant__ const int begins_early = 1;

// Any grid. The plan is complete if the call is active, so only the last block waits for peers,
// after its share. It sets `ok`. up, down: with gemm="cublas" no pipeline chunk, so nothing is
// written. pads: as for `prepare`.
extern "C" __global__ void __launch_bounds__(kPrepareThreads, 1)
    prepare_planned(const __grid_constant__ ExchangeParams params,
                    const __grid_constant__ PlannedTiles tiles,
                    const __grid_constant__ TileOrderParams up,
                    const __grid_constant__ TileOrderParams down,
                    const __grid_constant__ int pads) {
  __shared__ int warps[kWarps];
  __shared__ PlacedRun placed[kPrepareThreads];
  wait_for_previous_kernel();
  const auto team = Team<kPrepareThreads>::of_block(warps);
  if (params.state->status != kActive) return;
  write_tile_order(up, tiles, team, blockIdx.x, gridDim.x, placed);
  write_tile_order(down, tiles, team, blockIdx.x, gridDim.x, placed);
  if (pads) {
    const int warp = blockIdx.x * kWarps + threadIdx.x / 32;
    zero_padding_rows(params, params.rows, BLOCK_K, warp, gridDim.x * kWarps);
  }
  if (blockIdx.x == gridDim.x - 1) agree_on_call(params);
}
