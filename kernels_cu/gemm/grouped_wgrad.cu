// Grouped GEMM of weight gradients, for up to two weights of the experts in one launch, and the
// order of its tiles.
#include "gemm/grad_operands.cuh"
#include "gemm/kernel_body.cuh"
#include "gemm/wgrad_order.cuh"

using namespace cometrt;

namespace {

constexpr int kOrderThreads = 256;

// out = d, of the rows of out[expert]. A warp's rows all exist, or none of them.
struct Overwrite {
  static constexpr int kColumns = BLOCK_N, kSteps = 1;

  __device__ static void store(int, u32* pairs, SubtileStore& subtile, const WgradProblem& problem,
                               int expert, long long row, int column) {
    if (row >= problem.num_rows) return;
    __nv_bfloat16* out = static_cast<__nv_bfloat16*>(problem.out);
    const long long out_row = static_cast<long long>(expert) * problem.num_rows + row;
    subtile.store(pairs, out + out_row * problem.num_columns + column, problem.num_columns - column,
                  problem.num_columns);
  }
};

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
    Epilogue<Overwrite, NoSignal, WgradParams> epilogue(shared, p, warp, no_signal);
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
