// Dispatch and the up GEMM with its activation in one launch (COMET's layer0). In every CTA two
// dispatch warps pull token rows from their homes, in tile order, while two warpgroups multiply.
// The load thread waits for each tile's rows by tile_filled. Macros: ACTIVATION and WRITE_Z as in
// gemm/grouped_gemm.cu, TRACE, LINK.
#include "fused/arrivals.cuh"
#include "fused/rows_ready.cuh"
#include "gemm/kernel_body.cuh"

#ifndef ACTIVATION
#define ACTIVATION 0
#define WRITE_Z 1
#endif

using namespace cometrt;

namespace {

using Copies = CopyShape<3, 4096>;

struct Memory {
  Shared gemm;
  DispatchStages<Copies> dispatch[kCommWarps];
};
static_assert(sizeof(Memory) <= kMaxSharedBytes, "shared memory of a CTA");

// Padding rows have to be finite where a backward multiplies them by zeros. Zeroed rows end at a
// multiple of BLOCK_K, and a warpgroup whose rows are all padding stores zeros.
static_assert(kHalfM == BLOCK_K, "a warpgroup reads rows that nobody has zeroed");
using Math = Forward<ACTIVATION, WRITE_Z, WRITE_Z>;

struct Roles {
  using Registers = RegisterBudget<56, 224>;
  using Operands = RowsTimesWeights<Math::kGated>;

  const ExchangeParams& params;
  const EmulatedLink& link;
  Memory& memory;
  int num_comm;

  __device__ void init() {
    for (DispatchStages<Copies>& stages : memory.dispatch) stages.init();
  }
  __device__ void load(Shared& shared, const GemmParams& p, const Operands& operands) {
    RowsReady<Copies, true> ready(params, kUp);
    produce(shared, p, operands, ready);
    let_next_kernel_begin();  // not before: its CTAs would take SMs that are left to NCCL
  }
  __device__ void communicate(int warp) {
    if (warp < kFirstCommWarp || !params.state->ok) return;
    if (LATE) find_turn_ends(params, warp - kFirstCommWarp);
    if (!takes_part(params, kDispatchRole, num_comm)) return;
    DispatchWarp<Copies> dispatch(params, link, memory.dispatch[warp - kFirstCommWarp]);
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

// wait_for_previous_kernel().
extern "C" __constant__ const int begins_early = 1;

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
  Roles roles{params, link, all, num_comm};
  run_cta(all.gemm, p, {a_map, a_half_map, b_map, p.reads_weights_once != 0}, roles);
}
