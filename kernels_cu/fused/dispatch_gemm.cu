// Dispatch and the up GEMM in one launch (COMET's layer0). Every CTA multiplies. Two of its warps
// pull rows from their homes meanwhile, in the order in which the tiles need them; a tile waits for
// its own rows alone. Macros: as gemm/grouped_gemm.cu.
#include "fused/arrivals.cuh"
#include "fused/dispatch_warp.cuh"
#include "gemm/consumer.cuh"
#include "gemm/epilogue.cuh"
#include "gemm/hooks.cuh"
#include "gemm/producer.cuh"
#include "protocol/wait.cuh"

#ifndef ACTIVATION
#define ACTIVATION 0
#define WRITE_Z 1
#endif

using namespace cometrt;

namespace {

struct DispatchMemory {
  Shared gemm;
  DispatchStages dispatch;
};
static_assert(sizeof(DispatchMemory) <= 227 * 1024, "shared memory of an SM");

// Before the loads of a tile: waits until all its rows are there. Acquires tile_filled.
struct TileReady {
  const ExchangeParams& params;
  mutable bool stopped = false;  // then it waits no more: the call's results are NaN
  mutable Recorder recorder;

  __device__ void before_loads(const WorkTile& tile) const {
    if (stopped) return;
    const u32* filled = &params.tile_filled[tile.m_tile];
    recorder.begin_wait();
    stopped = !wait_until(params.world, {kTileFilled, params.world.rank, tile.m_tile, -1},
                          params.world.epoch(), tile.rows * num_copy_chunks(params.g),
                          [&] { return load_acquire_gpu(filled); });
    recorder.end_wait(kWaitTileFilled, tile.m_tile, tile.n_tile);
    fence_proxy_async();  // tensor loads read the rows
  }
};

}  // namespace

// Grid: an even number of CTAs, of which any number may be resident: CTAs take tiles and pulls as
// they come. As many dispatch warps work as `num_comm` CTAs have, the first that arrive. They wait
// for no tile, so that one of them is enough for every tile to get its rows.
extern "C" __global__ void __cluster_dims__(kClusterSize, 1, 1) __launch_bounds__(kThreads, 1)
    dispatch_gemm(const __grid_constant__ ExchangeParams params,
                  const __grid_constant__ GemmParams gemm_params,
                  const __grid_constant__ TensorMap a_map,
                  const __grid_constant__ TensorMap a_half_map,
                  const __grid_constant__ TensorMap b_map,
                  const __grid_constant__ EmulatedLink link, const __grid_constant__ int num_comm) {
  extern __shared__ __align__(1024) char memory[];
  DispatchMemory& all = *reinterpret_cast<DispatchMemory*>(memory);
  Shared& shared = all.gemm;
  const u32 cta = cluster_cta();
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x / 32), 0);  // known to be uniform
  if (threadIdx.x == 0) {
    init_barriers(shared);
    for (auto& full : all.dispatch.full) {
      for (u64& barrier : full) mbarrier_init(&barrier, 1);
    }
    mbarrier_init_fence();
  }
  cluster_barrier();
  if (warp < 4) {
    register_dealloc<56>();
    if (threadIdx.x == 0) {
      const TileReady hooks{params};
      hooks.recorder = Recorder(params.trace(), 1, kUp);
      produce<is_gated(ACTIVATION)>(shared, gemm_params, {a_map, a_half_map, b_map}, hooks);
    } else if (threadIdx.x == 32 && cta == 0) {
      schedule_tiles(shared, gemm_params);
    } else if (warp >= 2 && params.state->ok && takes_part(params, kPullers, num_comm)) {
      DispatchWarp dispatch(params, link, all.dispatch.bytes[warp - 2],
                            all.dispatch.full[warp - 2]);
      dispatch.recorder = Recorder(params.trace(), 1, kPull);
      dispatch.run();
    }
    __syncwarp();
  } else {
    register_alloc<224>();
    const NoHooks hooks;
    Epilogue<ACTIVATION, WRITE_Z, NoHooks> epilogue(shared, gemm_params, warp - 4, hooks);
    Recorder recorder(params.trace(), 1, kUp);
    consume(shared, gemm_params, warp / 4 - 1, epilogue, recorder);
  }
  cluster_barrier();  // nobody leaves while the neighbour may still write here
}
