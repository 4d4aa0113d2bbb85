// Grouped GEMM, forward forms: up (with activation) and down. Macros: ACTIVATION, a number of
// common/activation.cuh or -1; WRITE_Z, 1 when training.
#include "gemm/consumer.cuh"
#include "gemm/epilogue.cuh"
#include "gemm/hooks.cuh"
#include "gemm/producer.cuh"

#ifndef ACTIVATION
#define ACTIVATION -1
#define WRITE_Z 0
#endif

using namespace cometrt;

// Grid: an even number of CTAs, at most as many as run at once. Dynamic shared memory: Shared.
extern "C" __global__ void __cluster_dims__(kClusterSize, 1, 1) __launch_bounds__(kThreads, 1)
    grouped_gemm(const __grid_constant__ GemmParams p, const __grid_constant__ TensorMap a_map,
                 const __grid_constant__ TensorMap a_half_map,
                 const __grid_constant__ TensorMap b_map) {
  extern __shared__ __align__(1024) char memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  const u32 cta = cluster_cta();
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x / 32), 0);  // known to be uniform
  const NoHooks hooks;
  if (threadIdx.x == 0) {
    init_barriers(shared);
    mbarrier_init_fence();
  }
  cluster_barrier();
  if (warp < 4) {
    register_dealloc<40>();
    if (threadIdx.x == 0) {
      produce<ACTIVATION >= 0 && is_gated(ACTIVATION)>(shared, p, {a_map, a_half_map, b_map},
                                                       hooks);
    } else if (threadIdx.x == 32 && cta == 0) {
      schedule_tiles(shared, p);
    }
    __syncwarp();
  } else {
    register_alloc<232>();
    Epilogue<ACTIVATION, WRITE_Z, NoHooks> epilogue(shared, p, warp - 4, hooks);
    consume(shared, p, warp / 4 - 1, epilogue);
  }
  cluster_barrier();  // nobody leaves while the neighbour may still write here
}
