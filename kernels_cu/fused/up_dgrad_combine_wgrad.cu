// The up dgrad, combine of dx, and both weight gradients in one launch, the backward's second. In
// every CTA two warpgroups multiply. Tiles of the up dgrad come first and signal tile_done. Tiles
// of the weight gradients follow; they wait for no transfer. Meanwhile combine warps push and
// reduce dx, as in gemm_combine, and dweight with it. Macros: TRACE, LINK.
#include "fused/combine_role.cuh"
#include "gemm/kernel_body.cuh"
#include "gemm/up_dgrad_wgrad_epilogue.cuh"

using namespace cometrt;

namespace {

// Tiles of weight gradients signal nothing, since no warp waits for them.
struct DxDoneSignal : TileDoneSignal {
  __device__ int flag_of(const WorkTile& tile) const {
    return UpDgradWgradParams::is_wgrad(tile) ? -1 : TileDoneSignal::flag_of(tile);
  }
};

struct Roles : CombineRole<true> {
  using Registers = RegisterBudget<88, 208>;
  using Operands = UpDgradWgradOperands;
  using Params = UpDgradWgradParams;

  __device__ void load(Shared& shared, const Params& p, const Operands& operands) {
    AlwaysReady ready;
    produce(shared, p, operands, ready);
  }
  __device__ void multiply(Shared& shared, const Params& p, int warp) {
    const DxDoneSignal tile_done{params};
    UpDgradWgradEpilogue<DxDoneSignal> epilogue(shared, p, warp, tile_done);
    Recorder recorder(params.trace(), 1, kUpDgrad);
    consume<Operands>(shared, p, warp / 4, epilogue, recorder);
    end_of_tiles();
  }
};

}  // namespace

// Bytes of dynamic shared memory. The host reads it from the compiled kernel.
extern "C" __constant__ const int shared_bytes = sizeof(CombineMemory);

// wait_for_previous_kernel().
extern "C" __constant__ const int begins_early = 1;

// Grid and num_comm: as in gemm_combine. No deadlock: tiles wait for no combine warp.
extern "C" __global__ void __cluster_dims__(kClusterSize, 1, 1) __launch_bounds__(kThreads, 1)
    up_dgrad_combine_wgrad(
        const __grid_constant__ ExchangeParams params, const __grid_constant__ UpDgradWgradParams p,
        const __grid_constant__ TensorMap a_map, const __grid_constant__ TensorMap a_half_map,
        const __grid_constant__ TensorMap b_map, const __grid_constant__ WgradMaps wgrad_maps,
        const __grid_constant__ EmulatedLink link, const __grid_constant__ int num_comm) {
  extern __shared__ __align__(1024) char memory[];
  CombineMemory& all = *reinterpret_cast<CombineMemory*>(memory);
  Roles roles{{params, link, all, num_comm}};
  const UpDgradWgradOperands operands{{a_map, a_half_map, b_map},
                                      TransposedRowsTimesRows(wgrad_maps)};
  run_cta(all.gemm, p, operands, roles);
}
