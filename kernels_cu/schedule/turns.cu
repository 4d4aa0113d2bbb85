// The turns of a GEMM as a launch of its own, for GEMMs outside a layer.
#include "schedule/turns.cuh"

using namespace cometrt;

constexpr int kThreadsOfTurns = 1024;

extern "C" __global__ void __launch_bounds__(kThreadsOfTurns, 1)
    turns(const __grid_constant__ TurnsParams p, const __grid_constant__ PlannedTiles tiles) {
  __shared__ int shared[kThreadsOfTurns / 32];
  write_turns<kThreadsOfTurns>(p, tiles, blockIdx.x, gridDim.x, shared);
}
