// The down GEMM and combine in one launch. Every CTA multiplies; two of its warps sum and push
// partial rows as tiles end, and add up what comes home; when no tile is left, the two that loaded
// and dealt help them.
#include "fused/arrivals.cuh"
#include "fused/combine.cuh"
#include "gemm/consumer.cuh"
#include "gemm/epilogue.cuh"
#include "gemm/hooks.cuh"
#include "gemm/producer.cuh"

using namespace cometrt;

namespace {

struct Memory {
  Shared gemm;
  SumSlots sums[kMoverWarps];
};
static_assert(sizeof(Memory) <= 227 * 1024, "shared memory of an SM");
static_assert(2 * sizeof(SumSlots) <= sizeof(Shared::slots), "slots for those that help");

// A barrier of the block: those that multiply arrive, the first two warps wait.
constexpr int kConsumersDone = 1, kThreadsDone = 128 * kWarpgroups + 2 * 32;

// A warp's results of a tile are stored. Releases tile_done.
struct TilesEnd {
  static constexpr bool kTells = true;
  const Call& c;

  __device__ void after_stores(const WorkItem& item) const {
    __syncwarp();
    if (threadIdx.x % 32 != 0) return;
    const int chunk = item.column * BLOCK_N / c.chunk_columns;
    add_release_gpu(&c.tile_done[item.tile * c.num_chunks + chunk], 1);
  }
};

}  // namespace

// Grid: as in layer0. So many movers work, and other warps help, as `num_comm` CTAs have, the first
// that come; on each rank its own number: tiles wait for no mover; pushes wait for tiles of this
// rank, and home sums of a chunk for pushes of that chunk, which every mover of every rank comes to
// before it adds up that chunk at home.
extern "C" __global__ void __cluster_dims__(kClusterSize, 1, 1) __launch_bounds__(kThreads, 1)
    layer1(const __grid_constant__ Call c, const __grid_constant__ GemmParams p,
           const __grid_constant__ TensorMap a_map, const __grid_constant__ TensorMap a_half_map,
           const __grid_constant__ TensorMap b_map, const __grid_constant__ Pace pace,
           const __grid_constant__ int num_comm) {
  extern __shared__ __align__(1024) char memory[];
  Memory& all = *reinterpret_cast<Memory*>(memory);
  Shared& shared = all.gemm;
  const u32 cta = cluster_cta();
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x / 32), 0);  // known to be uniform
  if (threadIdx.x == 0) {
    init_barriers(shared);
    for (SumSlots& sums : all.sums) sums.init();
    mbarrier_init_fence();
  }
  cluster_barrier();
  if (warp < 4) {
    give_registers<88>();
    if (threadIdx.x == 0) {
      const NoHooks hooks;
      produce<false>(shared, p, {a_map, a_half_map, b_map}, hooks);
    } else if (threadIdx.x == 32 && cta == 0) {
      deal_turns(shared, p);
    }
    __syncwarp();
    SumSlots* sums = &all.sums[warp - 2];
    if (warp < 2) {
      // Out of tiles: help. All that was loaded into the slots, also by the neighbour, has been
      // waited for by both warpgroups, and read.
      named_barrier(kConsumersDone, kThreadsDone);
      sums = reinterpret_cast<SumSlots*>(shared.slots) + warp;
      if (threadIdx.x % 32 == 0) {
        sums->init();
        mbarrier_init_fence();
      }
      __syncwarp();
    }
    if (c.state->ok && takes_part(c, warp < 2 ? kHelpers : kCombiners, num_comm)) {
      Combine combine(c, pace, *sums);
      combine.recorder = Recorder(c.trace(), 1, kReduceAndPush);
      combine.run();
    }
    __syncwarp();
  } else {
    take_registers<208>();
    const TilesEnd hooks{c};
    Epilogue<-1, false, TilesEnd> epilogue(shared, p, warp - 4, hooks);
    Recorder recorder(c.trace(), 1, kDown);
    consume(shared, p, warp / 4 - 1, epilogue, recorder);
    named_barrier_arrive(kConsumersDone, kThreadsDone);
  }
  cluster_barrier();  // nobody leaves while the neighbour may still write here
}
