// Parameters and state of one exchange (a forward or a backward), shared by all its kernels.
// Structs are mirrored in cometrt/kernels/params.py under the same names with _dtype.
#pragma once

#include <cuda_bf16.h>

#include "common/geometry.cuh"
#include "common/trace.cuh"
#include "protocol/peers.cuh"
#include "protocol/plan_progress.cuh"

namespace cometrt {

// What `publish` decides of a call. Unless it is active, the call does nothing on this rank but set
// its results to NaN.
enum ExchangeStatus : u32 {
  kInert,          // the world has stopped, or an earlier call's error has not been raised yet
  kForwardFailed,  // a backward whose forward, or a forward whose plan, failed or was inert
  kActive,
};

// Device memory of a layer, between the kernels of a call. Stream order synchronises them.
struct ExchangeState {
  u32 ticket;    // blocks of `publish` that have finished; the last one sets it back to 0
  u32 status;    // ExchangeStatus; `publish` sets it
  u32 ok;        // 1 after the wait for all ranks; later kernels do nothing while it is 0
  u32 reported;  // a block of `finish` has reported that the call failed
  // `publish` sets both to 0.
  u64 waited_ns;       // the longest wait for a source_ready
  u64 rows_waited_ns;  // sum of the fused kernels' waits for tile_filled
};

// What ExchangeParams::state points to. Only kernels built with TRACE read `trace`.
struct TracedExchangeState : ExchangeState {
  TraceLane* trace;  // [CTAs, kTraceLanes]; null: nothing is recorded
};

// Indices into REPORTS of cometrt/cuda/report.py.
enum ReportKind : u64 { kNothing, kWrongRouting, kNoForward, kStopped, kStaleGraph };

// Report 0: calls that hold later ones until the host has raised their error. Report 1: others.
constexpr int kNumReports = COMETRT_NUM_REPORTS;

constexpr int kMaxTopk = COMETRT_MAX_TOPK;

// The first call that failed since the host last looked. kNumReports of them lie in host memory,
// for all layers of a world. The host reads one and sets its `kind` back to 0.
struct ExchangeReport {
  u64 kind;  // ReportKind; written last, behind a fence: then the rest is valid
  u64 epoch;
  long long layer, operation;
  u64 wrong_pair, largest_need;  // of PlanProgress
  float wrong_weight;            // of the wrong pair
  int wrong_ids[kMaxTopk + 1];   // [topk], of the wrong pair's token
};

// A word of what `finish` tells the host of a call: of all words with the same epoch. Words 0 and 1
// have the microseconds of waited_ns, and of rows_waited_ns for each SM, as floats; word 2 + e the
// rows of local expert e.
constexpr int kNumWaits = 2;
struct alignas(8) CallStats {
  u32 value, epoch;  // epoch: its low 32 bits
};

// Roles of the fused kernels whose number of warps a launch argument limits (fused/arrivals.cuh).
enum LimitedRole : int { kDispatchRole, kCombineRole, kHelperRole, kNumLimitedRoles };
static_assert(kNumLimitedRoles == COMETRT_NUM_ARRIVALS);

// What a call does not use is null or 0.
struct ExchangeParams {
  World world;
  Geometry g;
  // num_tokens: of this rank. ids_are_64: `ids` is int64. weighted: multiply rows by row_weight
  // when combining (forward).
  int num_n_chunks, num_tokens, ids_are_64, weighted;
  int n_chunk_columns, num_counters;
  // Byte offsets of this layer's arrays in the heap's regions, the same on every rank.
  u64 x_offset, dy_offset, ids_offset, weights_offset, staging_offset, dweight_offset,
      partials_offset;
  // Fields of the header.
  long long operation, layer, spec_hash;
  // Points to the epoch of a backward's forward, or of a planned forward's plan; 0: that failed.
  const long long* forward_epoch;
  ExchangeState* state;
  ExchangeReport* report;
  CallStats* stats;  // [1 + local_experts], in host memory
  // Inputs that `publish` copies into the heap. For later calls it saves the call's epoch (0 if it
  // fails), and for backward x, padded with zeros to max_tokens.
  const void *x, *dy, *ids;
  const float* weights;
  long long* saved_epoch;
  void* saved_x;
  // Plan and forward: the planner's copy of all ranks' routing tables, and its progress. Read for
  // reports of failures.
  const int* all_ids;
  const float* all_weights;
  const PlanProgress* progress;
  // The plan: fields of cometrt.plan.Plan.
  const int *expert_offsets, *expert_rows;
  const float* row_weight;
  const int *pair_row, *pull_tokens, *pull_offsets, *send_tokens, *send_offsets, *send_base;
  const int *push_blocks, *num_blocks, *block_tokens, *staging_row, *staging_base;
  // rows: [capacity, hidden], pulled from the homes' arrays at pull_offset. partial_rows: the last
  // GEMM's results, summed by token into `out` [num_tokens, hidden]. dweight_rows into out_dweight
  // [num_tokens, topk]. x_rows: of a fused backward with save="z", which pulls x again, behind dy.
  // With save="nothing" only `prepare_backward` gets it; x comes to `rows` in a launch of its own.
  u64 pull_offset;
  __nv_bfloat16 *rows, *x_rows;
  const __nv_bfloat16* partial_rows;
  __nv_bfloat16* out;
  const float* dweight_rows;  // [rows, num_dweight_partials], to be summed
  float* out_dweight;
  u64 num_dweight_partials;
  // Gradients of the weights, which become NaN if the call fails; null where they are accumulated.
  void *dw_up, *dw_down;
  u64 dw_up_bytes, dw_down_bytes;
  // All counters of the call, which `publish` zeroes. Forward: PlanProgress, the planner's, and
  // those below. Fused backward: those below.
  u32* counters;
  // Fused kernels only. tile_filled [max_tiles]: copy chunks in place, of rows of an M-tile.
  // tile_done [max_tiles, num_n_chunks]: warps that have stored their part of an N-tile.
  // queue_heads [1 + 2 * num_n_chunks]: of copy chunks to pull; then per N-chunk of blocks to push
  // and of blocks to reduce at home. arrivals [kNumLimitedRoles]: warps that have asked for a role.
  // A backward's launch that computes z again has its own of these, without tile_done.
  u32 *tile_filled, *tile_done, *queue_heads, *arrivals;
  // Only in kernels compiled with LATE=1. num_parts: late parts of the rows that a launch pulls.
  // part_rows, late_rows: a home's rows of a part, the last of which may have fewer, and of all.
  // part_sums [num_parts + 1]: rows of `out` that are complete, the last of own tokens, zeroed by
  // rail_pack. turn_ends
  // [num_parts]: of each turn of the combine warps, behind its last block in push_blocks; zeroed by
  // `publish`.
  u64 num_parts, part_rows, late_rows;
  u32 *part_sums, *turn_ends;

  __device__ TraceLane* const* trace() const {
    return &static_cast<const TracedExchangeState*>(state)->trace;
  }
  // Of a home's late row. Rows of one part lie together.
  __device__ int part_of_row(int row) const {
    return min(row / static_cast<int>(part_rows), static_cast<int>(num_parts) - 1);
  }
  // Combine warps take the last part first. The last turn has the home's own tokens.
  __device__ int turn_of_row(int row) const {
    const int parts = static_cast<int>(num_parts);
    return row < static_cast<int>(late_rows) ? parts - 1 - part_of_row(row) : parts;
  }
  template <typename T>
  __device__ T* data(int rank, u64 offset) const {
    return rows_of<T>(world, rank, offset);
  }
  // Ids or router weights of an epoch.
  template <typename T>
  __device__ T* routing(int rank, u64 epoch, u64 offset) const {
    return routing_of<T>(world, rank, epoch, offset);
  }
  // In the home's memory: the flags [num_n_chunks] of a contributor's block.
  __device__ u64* partials_ready(int home, int contributor, int block) const {
    const long long index = static_cast<long long>(contributor) * g.blocks_per_home + block;
    return flags_of(world, home, partials_offset) + index * num_n_chunks;
  }
};

}  // namespace cometrt
