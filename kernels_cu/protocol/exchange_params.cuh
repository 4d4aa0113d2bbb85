// One forward or backward as its kernels see it. Mirrored by call_dtype in
// cometrt/kernels/params.py. What a call does not use is null.
#pragma once

#include <cuda_bf16.h>

#include "common/geometry.cuh"
#include "common/trace.cuh"
#include "protocol/peers.cuh"
#include "protocol/plan_progress.cuh"

namespace cometrt {

// Whether a call takes part in an exchange. If not, it does nothing on this rank but set its
// results to NaN.
enum ExchangeStatus : u32 {
  kInert,          // the world is stopped, or an earlier call's error has not been raised yet
  kForwardFailed,  // a backward, of a forward that failed or was inert
  kActive,
};

struct ExchangeState {
  u32 ticket;    // blocks of `publish` that have finished
  u32 status;    // ExchangeStatus; `publish` sets it
  u32 ok;        // the plan is complete, or agreed on; where it is 0, later kernels do nothing
  u32 reported;  // a block of `finish` has found that the call failed
};

// What ExchangeParams::state points to; only kernels with TRACE read the rest.
struct TracedExchangeState : ExchangeState {
  TraceLane* trace;  // [CTAs, kTraceLanes]; null: nothing is recorded
};

// Numbers of REPORTS in cometrt/cuda/report.py.
enum ReportKind : u64 { kNothing, kWrongRouting, kNoForward, kStopped, kStaleGraph };

constexpr int kNumReports =
    COMETRT_NUM_REPORTS;  // the first for calls that hold later ones, the second for others

constexpr int kMaxTopk = COMETRT_MAX_TOPK;

// In the host's memory, kNumReports for all layers of a world: the first call that failed since the
// host last read it; then the host sets `kind` to 0 again. Mirrored by call_report_dtype.
struct ExchangeReport {
  u64 kind;  // ReportKind; written last: then the rest is valid
  u64 epoch;
  long long layer, operation;
  u64 wrong_pair, largest_need;  // as PlanProgress has them
  float wrong_weight;
  int wrong_ids[kMaxTopk + 1];  // of the pair's token, [topk]
};

// Roles that a launch argument limits. The first warps that arrive take them.
enum Arrivals : int { kPullers, kCombiners, kHelpers, kNumArrivals };
static_assert(kNumArrivals == COMETRT_NUM_ARRIVALS);

struct ExchangeParams {
  World world;
  Geometry g;
  int num_n_chunks, num_tokens, ids_are_64, weighted;
  int n_chunk_columns, num_counters;
  // Byte offsets in the heap's regions.
  u64 x_offset, dy_offset, ids_offset, weights_offset, staging_offset, dweight_offset,
      partials_offset;
  // The header.
  long long operation, layer, spec_hash;
  const long long* forward_epoch;  // points to 0: that forward failed
  ExchangeState* state;
  ExchangeReport* report;
  // publish: what it puts into the heap. What it saves for backward: the call's epoch (0 if it
  // fails), and x, with zeros up to max_tokens.
  const void *x, *dy, *ids;
  const float* weights;
  long long* saved_epoch;
  void* saved_x;
  // The planner's routing tables of all ranks and its progress; null in backward.
  const int* all_ids;
  const float* all_weights;
  const PlanProgress* progress;
  // The plan.
  const int *expert_offsets, *expert_rows;
  const float* row_weight;
  const int *pair_row, *pull_tokens, *pull_offsets, *send_tokens, *send_offsets, *send_base;
  const int *push_blocks, *num_blocks, *staging_row, *staging_base;
  // Rows: pulled from the heap's array at pull_offset; combined into out.
  u64 pull_offset;
  __nv_bfloat16* rows;
  const __nv_bfloat16* partial_rows;
  __nv_bfloat16* out;
  const float* dweight_rows;  // [rows, num_dweight_partials], to be summed
  float* out_dweight;
  u64 num_dweight_partials;
  // Gradients of the weights, which are NaN if the call fails; null where they are accumulated.
  void *dw_up, *dw_down;
  u64 dw_up_bytes, dw_down_bytes;
  // All that kernels of a forward count up, the planner's and those below. publish sets it to zero.
  u32* counters;
  // Fused kernels. tile_filled: copy chunks of rows that are in place, by M-tile. tile_done: warps
  // whose results are stored, by M-tile and N-chunk. queue_heads: of copy chunks to pull; then, for
  // each N-chunk, of blocks to push and of blocks to add up at home. arrivals: warps, by Arrivals.
  u32 *tile_filled, *tile_done, *queue_heads, *arrivals;

  __device__ TraceLane* const* trace() const {
    return &static_cast<const TracedExchangeState*>(state)->trace;
  }
  template <typename T>
  __device__ T* data(int rank, u64 offset) const {
    return rows_of<T>(world, rank, offset);
  }
  // Ids or router weights: each parity of the epoch has its region.
  template <typename T>
  __device__ T* routing(int rank, u64 epoch, u64 offset) const {
    return routing_of<T>(world, rank, epoch, offset);
  }
  // At the home: the flags of a contributor's block, one an N-chunk.
  __device__ u64* partials_ready(int home, int contributor, int block) const {
    const long long index = static_cast<long long>(contributor) * g.blocks_per_home + block;
    return flags_of(world, home, partials_offset) + index * num_n_chunks;
  }
};

}  // namespace cometrt
