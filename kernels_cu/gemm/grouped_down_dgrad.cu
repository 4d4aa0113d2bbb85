// The down dgrad alone, in the modes "sequential" and "chunked": the grouped GEMM da' = dy
// w_down[expert], whose epilogue computes dz, weighted_a and dweight. da' itself is never stored.
// Macro: ACTIVATION, an Activation of common/activation.cuh.
#include "gemm/down_dgrad_epilogue.cuh"
#include "gemm/grad_operands.cuh"
#include "gemm/kernel_body.cuh"

#ifndef ACTIVATION
#define ACTIVATION 0
#endif

using namespace cometrt;

namespace {

constexpr int kZStages = 3;
using Memory = DownDgradShared<kZStages>;
static_assert(sizeof(Memory) <= kMaxSharedBytes, "shared memory of a CTA");

struct Roles {
  using Registers = RegisterBudget<40, 232>;
  using Operands = RowsTimesTransposedWeights;

  Memory& all;

  __device__ void init() {}
  __device__ void load(Shared& shared, const DownDgradParams& p, const Operands& operands) {
    AlwaysReady ready;
    produce(shared, p, operands, ready);
  }
  __device__ void communicate(int) {}
  __device__ void multiply(Shared& shared, const DownDgradParams& p, int warp) {
    DownDgradEpilogue<ACTIVATION, kZStages> epilogue(all, p, warp);
    consume<Operands>(shared, p, warp / 4, epilogue);
  }
};

}  // namespace

// Bytes of dynamic shared memory. The host reads it from the compiled kernel.
extern "C" __constant__ const int shared_bytes = sizeof(Memory);

// Grid: an even number of CTAs, at most as many as fit on the GPU at once.
extern "C" __global__ void __cluster_dims__(kClusterSize, 1, 1) __launch_bounds__(kThreads, 1)
    grouped_down_dgrad(const __grid_constant__ DownDgradParams p,
                       const __grid_constant__ TensorMap a_map,
                       const __grid_constant__ TensorMap a_half_map,
                       const __grid_constant__ TensorMap b_map) {
  extern __shared__ __align__(1024) char memory[];
  Memory& all = *reinterpret_cast<Memory*>(memory);
  Roles roles{all};
  run_cta(all.gemm, p, {a_map, a_half_map, b_map}, roles);
}
