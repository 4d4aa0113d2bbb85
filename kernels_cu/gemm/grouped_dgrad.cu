// The up dgrad alone, in the modes "sequential" and "chunked": a grouped GEMM of activation
// gradients, out [rows, columns] = a [rows, K] b [expert, K, columns].
#include "gemm/grad_operands.cuh"
#include "gemm/kernel_body.cuh"

using namespace cometrt;

namespace {

struct Roles {
  using Registers = RegisterBudget<40, 232>;
  using Operands = RowsTimesTransposedWeights;

  __device__ void init() {}
  __device__ void load(Shared& shared, const GemmParams& p, const Operands& operands) {
    AlwaysReady ready;
    produce(shared, p, operands, ready);
  }
  __device__ void communicate(int) {}
  __device__ void multiply(Shared& shared, const GemmParams& p, int warp) {
    const NoSignal no_signal;
    Epilogue<Forward<-1, false>, NoSignal> epilogue(shared, p, warp, no_signal);
    consume<Operands>(shared, p, warp / 4, epilogue);
  }
};

}  // namespace

// Bytes of dynamic shared memory. The host reads it from the compiled kernel.
extern "C" __constant__ const int shared_bytes = sizeof(Shared);

// Grid: an even number of CTAs, at most as many as fit on the GPU at once.
extern "C" __global__ void __cluster_dims__(kClusterSize, 1, 1) __launch_bounds__(kThreads, 1)
    grouped_dgrad(const __grid_constant__ GemmParams p, const __grid_constant__ TensorMap a_map,
                  const __grid_constant__ TensorMap a_half_map,
                  const __grid_constant__ TensorMap b_map) {
  extern __shared__ __align__(1024) char memory[];
  Roles roles;
  run_cta(*reinterpret_cast<Shared*>(memory), p, {a_map, a_half_map, b_map}, roles);
}
