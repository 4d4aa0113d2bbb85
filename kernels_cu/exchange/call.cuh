// One forward or backward as its kernels see it. Mirrored by call_dtype in
// cometrt/kernels/params.py; what a kernel does not use is null.
#pragma once

#include <cuda_bf16.h>

#include "comm/world.cuh"
#include "common/geometry.cuh"
#include "common/trace.cuh"

namespace cometrt {

struct PlanProgress;  // plan/plan.cuh

// Whether a call takes part in an exchange. One that does not does nothing on this rank, as if it
// had not been made, but that its results are NaN.
enum CallStatus : u32 {
  kInert,          // the world is stopped, or an earlier call's error has not been raised yet
  kForwardFailed,  // a backward, of a forward that failed or was inert
  kActive,
};

struct CallState {
  u32 ticket;  // blocks of `publish` that are done
  u32 status;  // CallStatus, by `publish`
  u32 ok;      // the plan is complete, or agreed on: the only sign for later kernels to do anything
  u32 told;    // a block of `finish` has found that the call failed
};

// What Call::state points to in fact; apart, since TRACE alone looks at the rest.
struct TracedCallState : CallState {
  TraceLane* trace;  // [CTAs, kTraceLanes]; null: nothing is recorded
};

// Numbers of REPORTS in cometrt/cuda/report.py.
enum ReportKind : u64 { kNothing, kWrongRouting, kNoForward, kStopped, kStaleGraph };

// Calls that failed and hold later ones, and others, which may be told besides.
constexpr int kNumReports = 2;

constexpr int kMostReportedIds = 1024;

// In the host's memory, kNumReports for all layers of a world: the first call that went wrong since
// the host last looked, which then sets `kind` to 0 again. Mirrored by call_report_dtype.
struct CallReport {
  u64 kind;  // ReportKind; written last: then the rest is valid
  u64 epoch;
  long long layer, operation;
  u64 wrong_pair, largest_need;  // as PlanProgress has them
  float wrong_weight;
  int wrong_ids[kMostReportedIds + 1];  // of the pair's token, [topk]
};

// Roles of warps that a launch argument limits: the first that come take them.
enum Arrivals : int { kPullers, kCombiners, kHelpers, kNumArrivals };

struct Call {
  World world;
  Geometry g;
  int num_chunks, num_tokens, ids_are_64, weighted;
  int chunk_columns, num_counters;
  // Byte offsets in the heap's segments.
  u64 x_at, dy_at, ids_at, weights_at, staging_at, dweight_at, partials_at;
  // The header.
  long long operation, layer, spec_hash;
  const long long* forward_epoch;  // 0 there: that forward failed
  CallState* state;
  CallReport* report;
  // publish: what to put into the heap; what to keep for backward: the call's epoch, 0 if it fails,
  // and x with zeros up to max_tokens.
  const void *x, *dy, *ids;
  const float* weights;
  long long* kept_epoch;
  void* kept_x;
  // The planner's tables of all ranks and its progress; null in backward.
  const int* all_ids;
  const float* all_weights;
  const PlanProgress* progress;
  // The plan.
  const int *expert_offsets, *expert_rows;
  const float* row_weight;
  const int *pair_row, *pull_tokens, *pull_offsets, *send_tokens, *send_offsets, *send_base;
  const int *push_blocks, *num_blocks, *home_slot, *home_base;
  // Rows: pulled from the heap's array at pull_at; combined into out.
  u64 pull_at;
  __nv_bfloat16* rows;
  const __nv_bfloat16* partial_rows;
  __nv_bfloat16* out;
  const float* dweight_rows;
  float* out_dweight;
  // What kernels of a forward count up: the planner's, and those below; publish sets them to zero.
  u32* counters;
  // Fused: pieces of rows that have come, by M-tile; warps whose results are stored, by M-tile and
  // chunk; what movers have taken, of pieces of pulls, and of blocks to push and blocks at home by
  // chunk; warps of each role that have come, by Arrivals.
  u32 *tile_filled, *tile_done, *taken, *arrived;

  __device__ TraceLane* const* trace() const {
    return &static_cast<const TracedCallState*>(state)->trace;
  }
  template <typename T>
  __device__ T* data(int rank, u64 offset) const {
    return reinterpret_cast<T*>(world.data[rank] + offset);
  }
  // Ids or weights: a segment for each parity of the epoch.
  template <typename T>
  __device__ T* routing(int rank, u64 epoch, u64 offset) const {
    return reinterpret_cast<T*>(world.routing[epoch & 1][rank] + offset);
  }
  // The home's flags of a contributor's block, first chunk.
  __device__ u64* partials_ready(int home, int contributor, int block) const {
    const long long index = static_cast<long long>(contributor) * g.blocks_per_home + block;
    return reinterpret_cast<u64*>(world.flags[home] + partials_at) + index * num_chunks;
  }
};

}  // namespace cometrt
