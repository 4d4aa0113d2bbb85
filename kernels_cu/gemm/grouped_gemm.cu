// The grouped GEMM alone: the up GEMM with its activation, or the down GEMM, of a forward in the
// modes "sequential" and "chunked". Operands are complete before the launch, so nothing waits for a
// peer. Macros: ACTIVATION, an Activation of common/activation.cuh or -1; WRITE_Z, 1 to store z for
// backward.
#include "gemm/kernel_body.cuh"

#ifndef ACTIVATION
#define ACTIVATION -1
#define WRITE_Z 0
#endif

using namespace cometrt;

namespace {

using Math = Forward<ACTIVATION, WRITE_Z>;

struct Roles {
  using Registers = RegisterBudget<40, 232>;
  using Operands = RowsTimesWeights<Math::kGated>;

  __device__ void init() {}
  __device__ void load(Shared& shared, const GemmParams& p, const Operands& operands) {
    AlwaysReady ready;
    produce(shared, p, operands, ready);
  }
  __device__ void communicate(int) {}
  __device__ void multiply(Shared& shared, const GemmParams& p, int warp) {
    const NoSignal no_signal;
    Epilogue<Math, NoSignal> epilogue(shared, p, warp, no_signal);
    consume<Operands>(shared, p, warp / 4, epilogue);
  }
};

}  // namespace

// Bytes of dynamic shared memory. The host reads it from the compiled kernel.
extern "C" __constant__ const int shared_bytes = sizeof(Shared);

// Grid: an even number of CTAs, at most as many as fit on the GPU at once.
extern "C" __global__ void __cluster_dims__(kClusterSize, 1, 1) __launch_bounds__(kThreads, 1)
    grouped_gemm(const __grid_constant__ GemmParams p, const __grid_constant__ TensorMap a_map,
                 const __grid_constant__ TensorMap a_half_map,
                 const __grid_constant__ TensorMap b_map) {
  extern __shared__ __align__(1024) char memory[];
  Roles roles;
  run_cta(*reinterpret_cast<Shared*>(memory), p,
          {a_map, a_half_map, b_map, p.reads_weights_once != 0}, roles);
}
