// The down GEMM and combine in one launch (COMET's layer1). In every CTA two warpgroups multiply
// and signal tile_done. Two combine warps sum finished rows by token, push partial rows to their
// homes, and reduce this rank's own tokens. When no tile is left, the load and scheduler warps
// combine too. Macros: TRACE, LINK.
#include "fused/arrivals.cuh"
#include "fused/combine_warp.cuh"
#include "gemm/kernel_body.cuh"

using namespace cometrt;

namespace {

struct Memory {
  Shared gemm;
  CombineStages sums[kCommWarps];
};
static_assert(sizeof(Memory) <= 227 * 1024, "shared memory of an SM");
static_assert(2 * sizeof(CombineStages) <= sizeof(Shared::stages),
              "helpers reuse the GEMM's stages");

// Named barrier of the CTA: multiplying warps arrive when no tile is left, helper warps wait.
constexpr int kConsumersDoneBarrier = 1, kConsumersDoneThreads = 128 * kWarpgroups + 2 * 32;

// Signals tile_done once a warp that multiplies has stored its part of a tile: a release at gpu
// scope by lane 0 after __syncwarp. The partner is CombineWarp::wait_addends().
struct TileDoneSignal {
  static constexpr bool kSignals = true;
  const ExchangeParams& params;

  __device__ void signal(const WorkTile& tile) const {
    __syncwarp();
    if (threadIdx.x % 32 != 0) return;
    const int n_chunk = tile.n_tile * BLOCK_N / params.n_chunk_columns;
    add_release_gpu(&params.tile_done[tile.m_tile * params.num_n_chunks + n_chunk], 1);
  }
};

using Math = Forward<-1, false>;

struct Roles {
  using Registers = RegisterBudget<88, 208>;
  using Operands = RowsTimesWeights<false>;

  const ExchangeParams& params;
  const EmulatedLink& link;
  Memory& memory;
  int num_comm;

  __device__ void init() {
    for (CombineStages& sums : memory.sums) sums.init();
  }
  __device__ void load(Shared& shared, const GemmParams& p, const Operands& operands) {
    AlwaysReady ready;
    produce(shared, p, operands, ready);
  }
  __device__ void communicate(int warp) {
    CombineStages* sums = &memory.sums[warp - kFirstCommWarp];
    if (warp < kFirstCommWarp) {
      // Helpers reuse the memory of the GEMM's stages. At the barrier both warpgroups have read
      // every stage, so no load into them is pending, not even a multicast of the neighbour.
      named_barrier(kConsumersDoneBarrier, kConsumersDoneThreads);
      sums = reinterpret_cast<CombineStages*>(memory.gemm.stages) + warp;
      if (threadIdx.x % 32 == 0) {
        sums->init();
        mbarrier_init_fence();
      }
      __syncwarp();
    }
    if (!params.state->ok) return;
    if (!takes_part(params, warp < kFirstCommWarp ? kHelperRole : kCombineRole, num_comm)) return;
    CombineWarp combine(params, link, *sums);
    combine.recorder = Recorder(params.trace(), 1, kReduceAndPush);
    combine.run();
  }
  __device__ void multiply(Shared& shared, const GemmParams& p, int warp) {
    const TileDoneSignal tile_done{params};
    Epilogue<Math, TileDoneSignal> epilogue(shared, p, warp, tile_done);
    Recorder recorder(params.trace(), 1, kDown);
    consume<Operands>(shared, p, warp / 4, epilogue, recorder);
    named_barrier_arrive(kConsumersDoneBarrier, kConsumersDoneThreads);
  }
};

}  // namespace

// Bytes of dynamic shared memory. The host reads it from the compiled kernel.
extern "C" __constant__ const int shared_bytes = sizeof(Memory);

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
  Memory& all = *reinterpret_cast<Memory*>(memory);
  Roles roles{params, link, all, num_comm};
  run_cta(all.gemm, p, {a_map, a_half_map, b_map}, roles);
}
