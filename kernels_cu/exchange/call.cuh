// One forward or backward as its kernels see it. Mirrored by call_dtype in
// cometrt/kernels/params.py; what a kernel does not use is null.
#pragma once

#include <cuda_bf16.h>

#include "comm/world.cuh"
#include "common/geometry.cuh"

namespace cometrt {

struct CallState {
  u32 ticket, ok;
  long long epoch;
};

struct Call {
  World world;
  Geometry g;
  int num_chunks, num_tokens, ids_are_64, weighted;
  int chunk_columns, unused;
  // Byte offsets in the heap's segments.
  u64 x_at, dy_at, ids_at, weights_at, staging_at, dweight_at, partials_at;
  // The header.
  long long operation, layer, spec_hash;
  const long long* forward_epoch;
  CallState* state;
  // publish: what to put into the heap.
  const void *x, *dy, *ids;
  const float* weights;
  // gather: all ranks' tables; the planner's errors.
  int* all_ids;
  float* all_weights;
  int* all_num_tokens;
  const u64* errors;
  // The plan.
  const int *expert_offsets, *row_pair;
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
  // Fused: pieces of rows that have come, by M-tile; warps whose results are stored, by M-tile and
  // chunk; tokens pushed, by block. Zero when a call begins.
  u32 *tile_filled, *tile_done, *block_pushed;

  template <typename T>
  __device__ T* data(int rank, u64 offset) const {
    return reinterpret_cast<T*>(world.data[rank] + offset);
  }
  // The home's flags of a contributor's block, first chunk.
  __device__ u64* partials_ready(int home, int contributor, int block) const {
    const long long index = static_cast<long long>(contributor) * g.blocks_per_home + block;
    return reinterpret_cast<u64*>(world.flags[home] + partials_at) + index * num_chunks;
  }
};

}  // namespace cometrt
