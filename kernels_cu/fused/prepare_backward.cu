// Prepares a fused backward, as `prepare` does a forward. It writes the tile orders of the GEMMs
// from the forward's plan, zeroes padding rows, and compares the headers of all ranks.
#include "gemm/wgrad_order.cuh"
#include "plan/padding.cuh"
#include "protocol/agree.cuh"
#include "scheduler/tile_order.cuh"

using namespace cometrt;

namespace {

constexpr int kPrepareThreads = 1024, kWarps = kPrepareThreads / 32;

}  // namespace

// wait_for_previous_kernel().
extern "C" __constant__ const int begins_early = 1;

// Any grid. The list of the up dgrad goes on with the tiles of the weight gradients. The plan in
// `saved` is complete if the call is active, so only the last block waits for peers, after its
// share. It sets `ok`. recompute: of dispatch_gemm, where the backward computes z again; else no
// pipeline chunk, so nothing is written.
extern "C" __global__ void __launch_bounds__(kPrepareThreads, 1)
    prepare_backward(const __grid_constant__ ExchangeParams params,
                     const __grid_constant__ PlannedTiles tiles,
                     const __grid_constant__ TileOrderParams recompute,
                     const __grid_constant__ TileOrderParams down_dgrad,
                     const __grid_constant__ TileOrderParams up_dgrad,
                     const __grid_constant__ WgradParams wgrads) {
  __shared__ int warps[kWarps];
  __shared__ PlacedRun placed[kPrepareThreads];
  wait_for_previous_kernel();
  const auto team = Team<kPrepareThreads>::of_block(warps);
  if (params.state->status != kActive) return;
  write_tile_order(recompute, tiles, team, blockIdx.x, gridDim.x, placed);
  write_tile_order(down_dgrad, tiles, team, blockIdx.x, gridDim.x, placed);
  const int steps = write_tile_order(up_dgrad, tiles, team, blockIdx.x, gridDim.x, placed);
  write_wgrad_order(wgrads, up_dgrad.work_tiles, up_dgrad.num_steps, up_dgrad.progress, steps,
                    kFirstWgrad);
  const int warp = blockIdx.x * kWarps + threadIdx.x / 32;
  zero_padding_rows(params, params.rows, BLOCK_K, warp, gridDim.x * kWarps);
  if (params.x_rows != nullptr) {
    zero_padding_rows(params, params.x_rows, BLOCK_K, warp, gridDim.x * kWarps);
  }
  if (blockIdx.x == gridDim.x - 1) agree_on_call(params);
}
