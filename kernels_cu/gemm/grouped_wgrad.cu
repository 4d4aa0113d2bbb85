// Grouped GEMM of weight gradients, for up to two weights of the experts in one launch, and the
// order of its tiles.
#include "gemm/grad_operands.cuh"
#include "gemm/kernel_body.cuh"
#include "gemm/wgrad_epilogue.cuh"
#include "gemm/wgrad_order.cuh"

using namespace cometrt;

namespace {

constexpr int kOrderThreads = 256;

struct Roles {
  using Registers = RegisterBudget<40, 232>;
  using Operands = TransposedRowsTimesRows;

  __device__ void init() {}
  __device__ void load(Shared& shared, const WgradParams& p, const Operands& operands) {
    AlwaysReady ready;
    produce(shared, p, operands, ready);
  }
  __device__ void communicate(int) {}
  __device__ void multiply(Shared& shared, const WgradParams& p, int warp) {
    const NoSignal no_signal;
    WgradEpilogue<> epilogue(shared, p, warp, no_signal);
    consume<Operands>(shared, p, warp / 4, epilogue);
  }
};

}  // namespace

// Dynamic shared memory, which the host reads from the compiled file.
extern "C" __constant__ const int shared_bytes = sizeof(Shared);

// Grid: an even number of CTAs, at most as many as run at once. Dynamic shared memory: Shared.
extern "C" __global__ void __cluster_dims__(kClusterSize, 1, 1) __launch_bounds__(kThreads, 1)
    grouped_wgrad(const __grid_constant__ WgradParams p, const __grid_constant__ WgradMaps maps) {
  extern __shared__ __align__(1024) char memory[];
  Roles roles;
  run_cta(*reinterpret_cast<Shared*>(memory), p, TransposedRowsTimesRows(maps), roles);
}

// Writes what `p.work_tiles`, `p.num_steps` and `p.progress` point to. Any grid.
extern "C" __global__ void __launch_bounds__(kOrderThreads)
    wgrad_order(const __grid_constant__ WgradParams p) {
  write_wgrad_order(p, const_cast<WorkTile*>(p.work_tiles), const_cast<int*>(p.num_steps),
                    p.progress);
}
