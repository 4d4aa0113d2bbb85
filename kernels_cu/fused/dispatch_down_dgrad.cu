// Dispatch of dy and the down dgrad in one launch, the backward's first. In every CTA
// two dispatch warps pull rows of dy from their homes, in tile order, while two warpgroups
// multiply. With save="z" they then pull x again. The launch ends after the last pull, and partial
// rows of dx leave in a later launch. Macros: ACTIVATION as in gemm/grouped_down_dgrad.cu, TRACE,
// LINK.

// One stage fewer than other kernels have: rows on their way need the room more.
#define GEMM_STAGES 3
#include "fused/arrivals.cuh"
#include "fused/rows_ready.cuh"
#include "gemm/down_dgrad_epilogue.cuh"
#include "gemm/grad_operands.cuh"
#include "gemm/kernel_body.cuh"

#ifndef ACTIVATION
#define ACTIVATION 0
#endif

using namespace cometrt;

namespace {

// z and the copy stages share what the GEMM's stages leave.
constexpr int kZStages = 2;
using Copies = CopyShape<6, 4096>;

struct Memory {
  DownDgradShared<kZStages> gemm;
  DispatchStages<Copies> dispatch[kCommWarps];
};
static_assert(sizeof(Memory) <= kMaxSharedBytes, "shared memory of a CTA");

struct Roles {
  using Registers = RegisterBudget<LATE ? 56 : 40, LATE ? 224 : 232>;
  using Operands = RowsTimesTransposedWeights;

  const ExchangeParams& params;
  const EmulatedLink& link;
  Memory& memory;
  int num_comm;

  __device__ void init() {
    for (DispatchStages<Copies>& stages : memory.dispatch) stages.init();
  }
  __device__ void load(Shared& shared, const DownDgradParams& p, const Operands& operands) {
    // Loads of B ahead need more than this warpgroup's registers.
    RowsReady<Copies, false> ready(params, kDownDgrad);
    produce(shared, p, operands, ready);
    let_next_kernel_begin();  // as in dispatch_gemm
  }
  __device__ void communicate(int warp) {
    if (warp < kFirstCommWarp || !params.state->ok) return;
    if (LATE) find_turn_ends(params, warp - kFirstCommWarp);
    if (!takes_part(params, kDispatchRole, num_comm)) return;
    DispatchWarp<Copies, true> dispatch(params, link, memory.dispatch[warp - kFirstCommWarp]);
    dispatch.recorder = Recorder(params.trace(), 1, kPull);
    dispatch.run();
  }
  __device__ void multiply(Shared& shared, const DownDgradParams& p, int warp) {
    DownDgradEpilogue<ACTIVATION, kZStages> epilogue(memory.gemm, p, warp);
    Recorder recorder(params.trace(), 1, kDownDgrad);
    consume<Operands>(shared, p, warp / 4, epilogue, recorder);
  }
};

}  // namespace

// Bytes of dynamic shared memory. The host reads it from the compiled kernel.
extern "C" __constant__ const int shared_bytes = sizeof(Memory);

// wait_for_previous_kernel().
extern "C" __constant__ const int begins_early = 1;

// Grid and num_comm: as in dispatch_gemm.
extern "C" __global__ void __cluster_dims__(kClusterSize, 1, 1) __launch_bounds__(kThreads, 1)
    dispatch_down_dgrad(const __grid_constant__ ExchangeParams params,
                        const __grid_constant__ DownDgradParams p,
                        const __grid_constant__ TensorMap a_map,
                        const __grid_constant__ TensorMap a_half_map,
                        const __grid_constant__ TensorMap b_map,
                        const __grid_constant__ EmulatedLink link,
                        const __grid_constant__ int num_comm) {
  extern __shared__ __align__(1024) char memory[];
  Memory& all = *reinterpret_cast<Memory*>(memory);
  Roles roles{params, link, all, num_comm};
  run_cta(all.gemm.gemm, p, {a_map, a_half_map, b_map}, roles);
}
