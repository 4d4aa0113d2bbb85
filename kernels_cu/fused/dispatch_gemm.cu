// Dispatch and the up GEMM with its activation in one launch (COMET's layer0). In every CTA two
// dispatch warps pull token rows from their homes, in tile order, while two warpgroups multiply.
// The load thread waits for each tile's rows by tile_filled. Macros: ACTIVATION and WRITE_Z as in
// gemm/grouped_gemm.cu, TRACE, LINK.
#include "fused/arrivals.cuh"
#include "fused/dispatch_warp.cuh"
#include "gemm/kernel_body.cuh"
#include "protocol/wait.cuh"

#ifndef ACTIVATION
#define ACTIVATION 0
#define WRITE_Z 1
#endif

using namespace cometrt;

namespace {

struct Memory {
  Shared gemm;
  DispatchStages dispatch;
};
static_assert(sizeof(Memory) <= 227 * 1024, "shared memory of an SM");

// The load thread's wait for a tile's rows. Acquires tile_filled at gpu scope; its partner is
// DispatchWarp::release().
class RowsReady {
 public:
  __device__ explicit RowsReady(const ExchangeParams& params) : params_(params) {
    recorder_ = Recorder(params.trace(), 1, kUp);
  }

  __device__ void wait(const WorkTile& tile) {
    if (stopped_) return;
    const u32* filled = &params_.tile_filled[tile.m_tile];
    recorder_.begin_wait();
    stopped_ = !wait_until(params_.world, {kTileFilled, params_.world.rank, tile.m_tile, -1},
                           params_.world.epoch(), tile.rows * num_copy_chunks(params_.g),
                           [&] { return load_acquire_gpu(filled); });
    recorder_.end_wait(kWaitTileFilled, tile.m_tile, tile.n_tile);
    fence_proxy_async();  // tensor loads read the rows
  }

 private:
  const ExchangeParams& params_;
  bool stopped_ = false;  // the world has stopped: no more waits, since the results become NaN
  Recorder recorder_;
};

using Math = Forward<ACTIVATION, WRITE_Z>;

struct Roles {
  using Registers = RegisterBudget<56, 224>;
  using Operands = RowsTimesWeights<Math::kGated>;

  const ExchangeParams& params;
  const EmulatedLink& link;
  DispatchStages& stages;
  int num_comm;

  __device__ void init() {
    for (auto& of_warp : stages.full) {
      for (u64& barrier : of_warp) mbarrier_init(&barrier, 1);
    }
  }
  __device__ void load(Shared& shared, const GemmParams& p, const Operands& operands) {
    RowsReady ready(params);
    produce(shared, p, operands, ready);
  }
  __device__ void communicate(int warp) {
    if (warp < kFirstCommWarp || !params.state->ok) return;
    if (!takes_part(params, kDispatchRole, num_comm)) return;
    const int index = warp - kFirstCommWarp;
    DispatchWarp dispatch(params, link, stages.bytes[index], stages.full[index]);
    dispatch.recorder = Recorder(params.trace(), 1, kPull);
    dispatch.run();
  }
  __device__ void multiply(Shared& shared, const GemmParams& p, int warp) {
    const NoSignal no_signal;
    Epilogue<Math, NoSignal> epilogue(shared, p, warp, no_signal);
    Recorder recorder(params.trace(), 1, kUp);
    consume<Operands>(shared, p, warp / 4, epilogue, recorder);
  }
};

}  // namespace

// Bytes of dynamic shared memory. The host reads it from the compiled kernel.
extern "C" __constant__ const int shared_bytes = sizeof(Memory);

// Grid: an even number of CTAs. Any number of them may be resident, since tiles and copy chunks are
// popped from queues. num_comm: dispatch warps of so many CTAs work. They wait for no tile, so one
// of them is enough for progress.
extern "C" __global__ void __cluster_dims__(kClusterSize, 1, 1) __launch_bounds__(kThreads, 1)
    dispatch_gemm(const __grid_constant__ ExchangeParams params,
                  const __grid_constant__ GemmParams p, const __grid_constant__ TensorMap a_map,
                  const __grid_constant__ TensorMap a_half_map,
                  const __grid_constant__ TensorMap b_map,
                  const __grid_constant__ EmulatedLink link, const __grid_constant__ int num_comm) {
  extern __shared__ __align__(1024) char memory[];
  Memory& all = *reinterpret_cast<Memory*>(memory);
  Roles roles{params, link, all.dispatch, num_comm};
  run_cta(all.gemm, p, {a_map, a_half_map, b_map}, roles);
}
