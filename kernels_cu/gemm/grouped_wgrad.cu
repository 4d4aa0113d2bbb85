// Grouped GEMM of weight gradients: those of up to two weights of all experts in one launch. A
// second kernel writes its tile order.
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

  WgradShared& wgrad_shared;
  const WgradMaps& maps;

  __device__ void init() {
    for (u64& barrier : wgrad_shared.old_full) mbarrier_init(&barrier, 1);
  }
  __device__ void load(Shared& shared, const WgradParams& p, const Operands& operands) {
    AlwaysReady ready;
    produce(shared, p, operands, ready);
  }
  __device__ void communicate(int) {}
  __device__ void multiply(Shared& shared, const WgradParams& p, int warp) {
    if (p.overwrites_bf16()) {
      const NoSignal no_signal;
      Bf16WgradEpilogue epilogue(shared, p, warp, no_signal);
      consume<Operands>(shared, p, warp / 4, epilogue);
    } else {
      BoxEpilogue epilogue(wgrad_shared, p, maps);
      consume<Operands>(shared, p, warp / 4, epilogue);
      epilogue.finish();
    }
  }
};

}  // namespace

// Bytes of dynamic shared memory. The host reads it from the compiled kernel.
extern "C" __constant__ const int shared_bytes = sizeof(WgradShared);

// Grid: an even number of CTAs, at most as many as fit on the GPU at once.
extern "C" __global__ void __cluster_dims__(kClusterSize, 1, 1) __launch_bounds__(kThreads, 1)
    grouped_wgrad(const __grid_constant__ WgradParams p, const __grid_constant__ WgradMaps maps) {
  extern __shared__ __align__(1024) char memory[];
  WgradShared& shared = *reinterpret_cast<WgradShared*>(memory);
  Roles roles{shared, maps};
  run_cta(shared, p, TransposedRowsTimesRows(maps), roles);
}

// Writes what `p.work_tiles`, `p.num_steps` and `p.progress` point to. Any grid.
extern "C" __global__ void __launch_bounds__(kOrderThreads)
    wgrad_order(const __grid_constant__ WgradParams p) {
  write_wgrad_order(p, const_cast<WorkTile*>(p.work_tiles), const_cast<int*>(p.num_steps),
                    p.progress);
}
