// Dispatch and the up GEMM in one launch. Every CTA multiplies; two of its warps pull rows from
// their homes meanwhile, in the order in which tiles need them, and a tile waits for its own rows
// only. Macros: as gemm/forward.cu.
#include "comm/movers.cuh"
#include "comm/wait.cuh"
#include "fused/arrivals.cuh"
#include "gemm/consumer.cuh"
#include "gemm/epilogue.cuh"
#include "gemm/hooks.cuh"
#include "gemm/producer.cuh"

#ifndef ACTIVATION
#define ACTIVATION 0
#define WRITE_Z 1
#endif

using namespace cometrt;

namespace {

struct Memory {
  Shared gemm;
  MoverSlots movers;
};
static_assert(sizeof(Memory) <= 227 * 1024, "shared memory of an SM");

// A tile's loads wait until all its rows are there. Acquires tile_filled.
struct RowsArrive {
  const Call& c;
  mutable bool stopped = false;  // then nothing is waited for any more: the call's results are NaN
  mutable Recorder recorder;

  __device__ void before_loads(const WorkItem& item) const {
    if (stopped) return;
    const u32* filled = &c.tile_filled[item.tile];
    recorder.begin_wait();
    stopped = !wait_until(c.world, {kTileFilled, c.world.rank, item.tile, -1}, c.world.epoch(),
                          item.rows * num_pieces(c.g), [&] { return load_acquire_gpu(filled); });
    recorder.end_wait(kWaitTileFilled, item.tile, item.column);
    fence_proxy_async();  // rows are read by tensor loads
  }
};

}  // namespace

// Grid: an even number of CTAs, of which any number may be resident: tiles and pulls are taken as
// CTAs come. So many movers work as `num_comm` CTAs have, the first that come: any number from 1 to
// all. They wait for no tile, so that one of them is enough for every tile to get its rows.
extern "C" __global__ void __cluster_dims__(kClusterSize, 1, 1) __launch_bounds__(kThreads, 1)
    layer0(const __grid_constant__ Call c, const __grid_constant__ GemmParams p,
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
    for (auto& full : all.movers.full) {
      for (u64& of_slot : full) mbarrier_init(&of_slot, 1);
    }
    mbarrier_init_fence();
  }
  cluster_barrier();
  if (warp < 4) {
    give_registers<56>();
    if (threadIdx.x == 0) {
      const RowsArrive hooks{c};
      hooks.recorder = Recorder(c.trace(), 1, kUp);
      produce<is_gated(ACTIVATION)>(shared, p, {a_map, a_half_map, b_map}, hooks);
    } else if (threadIdx.x == 32 && cta == 0) {
      deal_turns(shared, p);
    } else if (warp >= 2 && c.state->ok && takes_part(c, kPullers, num_comm)) {
      Puller puller(c, pace, all.movers.bytes[warp - 2], all.movers.full[warp - 2]);
      puller.recorder = Recorder(c.trace(), 1, kPull);
      puller.run();
    }
    __syncwarp();
  } else {
    take_registers<224>();
    const NoHooks hooks;
    Epilogue<ACTIVATION, WRITE_Z, NoHooks> epilogue(shared, p, warp - 4, hooks);
    Recorder recorder(c.trace(), 1, kUp);
    consume(shared, p, warp / 4 - 1, epilogue, recorder);
  }
  cluster_barrier();  // nobody leaves while the neighbour may still write here
}
