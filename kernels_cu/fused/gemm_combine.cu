// The down GEMM and combine in one launch (COMET's layer1). Every CTA multiplies. Two of its warps
// sum and push partial rows as tiles end, and add up what comes home. When no tile is left, the
// warps that loaded and scheduled help them.
#include "fused/arrivals.cuh"
#include "fused/combine_warp.cuh"
#include "gemm/consumer.cuh"
#include "gemm/epilogue.cuh"
#include "gemm/hooks.cuh"
#include "gemm/producer.cuh"

using namespace cometrt;

namespace {

struct CombineMemory {
  Shared gemm;
  CombineStages sums[kCommWarps];
};
static_assert(sizeof(CombineMemory) <= 227 * 1024, "shared memory of an SM");
static_assert(2 * sizeof(CombineStages) <= sizeof(Shared::stages), "room for the helpers");

// A barrier of the CTA: the warps that multiply arrive, the first two warps wait.
constexpr int kConsumersDone = 1, kThreadsDone = 128 * kWarpgroups + 2 * 32;

// After the stores of a tile: each warp signals tile_done for its part.
struct TileStored {
  static constexpr bool kSignals = true;
  const ExchangeParams& params;

  __device__ void after_stores(const WorkTile& tile) const {
    __syncwarp();
    if (threadIdx.x % 32 != 0) return;
    const int n_chunk = tile.n_tile * BLOCK_N / params.n_chunk_columns;
    add_release_gpu(&params.tile_done[tile.m_tile * params.num_n_chunks + n_chunk], 1);
  }
};

}  // namespace

// Grid: as in dispatch_gemm. As many combine warps work, and as many helpers, as `num_comm` CTAs
// have; ranks may differ. All make progress: tiles wait for no combine warp; a push waits for tiles
// of this rank; a home sum waits for pushes of its N-chunk, which every warp of every rank comes to
// first.
extern "C" __global__ void __cluster_dims__(kClusterSize, 1, 1) __launch_bounds__(kThreads, 1)
    gemm_combine(const __grid_constant__ ExchangeParams params,
                 const __grid_constant__ GemmParams gemm_params,
                 const __grid_constant__ TensorMap a_map,
                 const __grid_constant__ TensorMap a_half_map,
                 const __grid_constant__ TensorMap b_map, const __grid_constant__ EmulatedLink link,
                 const __grid_constant__ int num_comm) {
  extern __shared__ __align__(1024) char memory[];
  CombineMemory& all = *reinterpret_cast<CombineMemory*>(memory);
  Shared& shared = all.gemm;
  const u32 cta = cluster_cta();
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x / 32), 0);  // known to be uniform
  if (threadIdx.x == 0) {
    init_barriers(shared);
    for (CombineStages& sums : all.sums) sums.init();
    mbarrier_init_fence();
  }
  cluster_barrier();
  if (warp < 4) {
    register_dealloc<88>();
    if (threadIdx.x == 0) {
      const NoHooks hooks;
      produce<false>(shared, gemm_params, {a_map, a_half_map, b_map}, hooks);
    } else if (threadIdx.x == 32 && cta == 0) {
      schedule_tiles(shared, gemm_params);
    }
    __syncwarp();
    CombineStages* sums = &all.sums[warp - 2];
    if (warp < 2) {
      // Helpers use the memory of the GEMM's stages: both warpgroups have waited for all that was
      // loaded there, also by the neighbour, and have read it.
      named_barrier(kConsumersDone, kThreadsDone);
      sums = reinterpret_cast<CombineStages*>(shared.stages) + warp;
      if (threadIdx.x % 32 == 0) {
        sums->init();
        mbarrier_init_fence();
      }
      __syncwarp();
    }
    if (params.state->ok && takes_part(params, warp < 2 ? kHelpers : kCombiners, num_comm)) {
      CombineWarp combine(params, link, *sums);
      combine.recorder = Recorder(params.trace(), 1, kReduceAndPush);
      combine.run();
    }
    __syncwarp();
  } else {
    register_alloc<208>();
    const TileStored hooks{params};
    Epilogue<-1, false, TileStored> epilogue(shared, gemm_params, warp - 4, hooks);
    Recorder recorder(params.trace(), 1, kDown);
    consume(shared, gemm_params, warp / 4 - 1, epilogue, recorder);
    named_barrier_arrive(kConsumersDone, kThreadsDone);
  }
  cluster_barrier();  // nobody leaves while the neighbour may still write here
}
