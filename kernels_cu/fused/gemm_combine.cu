// The down GEMM and combine in one launch (COMET's layer1). In every CTA two warpgroups multiply
// and signal tile_done. Two combine warps sum finished rows by token, push partial rows to their
// homes, and reduce this rank's own tokens. When no tile is left, the load and scheduler warps
// combine too. Macros: TRACE, LINK.
#include "fused/combine_role.cuh"
#include "gemm/kernel_body.cuh"

using namespace cometrt;

namespace {

using Math = Forward<-1, false, false>;

struct Roles : CombineRole<false> {
  using Registers = RegisterBudget<88, 208>;
  using Operands = RowsTimesWeights<false>;

  __device__ void load(Shared& shared, const GemmParams& p, const Operands& operands) {
    AlwaysReady ready;
    produce(shared, p, operands, ready);
  }
  __device__ void multiply(Shared& shared, const GemmParams& p, int warp) {
    const TileDoneSignal tile_done{params};
    Epilogue<Math, TileDoneSignal> epilogue(shared, p, warp, tile_done);
    Recorder recorder(params.trace(), 1, kDown);
    consume<Operands>(shared, p, warp / 4, epilogue, recorder);
    end_of_tiles();
  }
};

}  // namespace

// Bytes of dynamic shared memory. The host reads it from the compiled kernel.
extern "C" __constant__ const int shared_bytes = sizeof(CombineMemory);

// wait_for_previous_kernel().
extern "C" __constant__ const int begins_early = 1;

// Grid: as in dispatch_gemm. num_comm: combine warps and helpers of so many CTAs work; ranks may
// differ. No deadlock: tiles wait for no combine warp; a push waits for tiles of this rank only; a
// reduction at home waits for pushes of its N-chunk, which every warp of every rank does first.
extern "C" __global__ void __cluster_dims__(kClusterSize, 1, 1) __launch_bounds__(kThreads, 1)
    gemm_combine(const __grid_constant__ ExchangeParams params,
                 const __grid_constant__ GemmParams p, const __grid_constant__ TensorMap a_map,
                 const __grid_constant__ TensorMap a_half_map,
                 const __grid_constant__ TensorMap b_map, const __grid_constant__ EmulatedLink link,
                 const __grid_constant__ int num_comm) {
  extern __shared__ __align__(1024) char memory[];
  CombineMemory& all = *reinterpret_cast<CombineMemory*>(memory);
  Roles roles{{params, link, all, num_comm}};
  run_cta(all.gemm, p, {a_map, a_half_map, b_map, p.reads_weights_once != 0}, roles);
}
