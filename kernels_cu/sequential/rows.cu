// Row movement in launches of its own, for both passes of modes "sequential" and "chunked":
// `dispatch` pulls token rows from their homes, `push` sums rows by token and pushes partial rows
// to the homes, `home_reduce` adds them up. A launch serves a whole call or one pipeline chunk, on
// all SMs or beside a GEMM. Only partials_ready (push to home_reduce) is a flag; stream order does
// the rest.
#include "common/packed_rows.cuh"
#include "hopper/bulk.cuh"
#include "plan/padding.cuh"
#include "protocol/dweight.cuh"
#include "protocol/emulated_link.cuh"
#include "protocol/wait.cuh"
#include "scheduler/pipeline_chunk.cuh"

using namespace cometrt;

namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kPullWarps = COMETRT_PULL_WARPS;
constexpr int kPushThreads = 768;  // one CTA fills an SM, so a GEMM beside it gets whole SMs
constexpr int kVectorsAtOnce = 4;  // 16-byte vectors of a row, per lane

using Sums = float[kVectorsAtOnce][8];  // [i]: columns first + 256 * i + 8 * lane and the next 7

// By a warp: adds one row per lane (null: none), times its weight, in lane order.
__device__ inline void add_rows(Sums& sum, const __nv_bfloat16* mine, float weight_of_mine,
                                int first, int hidden) {
  const int column = first + threadIdx.x % 32 * 8;
  for (u32 left = __ballot_sync(~0u, mine != nullptr); left != 0; left &= left - 1) {
    const int from = __ffs(left) - 1;
    const u64 address = __shfl_sync(~0u, reinterpret_cast<u64>(mine), from);
    const float weight = __shfl_sync(~0u, weight_of_mine, from);
    const __nv_bfloat16* row = reinterpret_cast<const __nv_bfloat16*>(address) + column;
    uint4 vectors[kVectorsAtOnce];  // all loads in flight at once
#pragma unroll
    for (int i = 0; i < kVectorsAtOnce; ++i) {
      vectors[i] = column + 256 * i < hidden ? *reinterpret_cast<const uint4*>(row + 256 * i)
                                             : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int i = 0; i < kVectorsAtOnce; ++i) add_packed(sum[i], vectors[i], weight);
  }
}

// By a warp: adds a token's rows on this rank in the order of k.
__device__ inline void add_local_rows(const ExchangeParams& params, long long token, int first,
                                      Sums& sum) {
  const int lane = threadIdx.x % 32;
  for (int k = lane; k - lane < params.g.topk; k += 32) {
    const int row = k < params.g.topk ? params.pair_row[token * params.g.topk + k] : -1;
    const float weight = row >= 0 && params.weighted ? params.row_weight[row] : 1.0f;
    const __nv_bfloat16* from = params.partial_rows + static_cast<long long>(row) * params.g.hidden;
    add_rows(sum, row >= 0 ? from : nullptr, weight, first, params.g.hidden);
  }
}

__device__ inline void store_sums(__nv_bfloat16* row, const Sums& sum, int first, int hidden) {
  const int column = first + threadIdx.x % 32 * 8;
#pragma unroll
  for (int i = 0; i < kVectorsAtOnce; ++i) {
    if (column + 256 * i < hidden) store_row(row + column + 256 * i, sum[i]);
  }
}

// Indices [first, end) into pull_tokens or push_blocks.
struct Range {
  int first, end;
};

__device__ inline int chunk_begin(const ExchangeParams& params, const PipelineChunk& chunk,
                                  int index) {
  return pipeline_chunk_begin(params.expert_offsets[params.g.local_experts] / params.g.block_m,
                              index, chunk.count);
}

// The tokens that tiles of the pipeline chunk need first.
__device__ inline Range pulls_of(const ExchangeParams& params, const PipelineChunk& chunk) {
  if (chunk.count == 1) return {0, params.pull_offsets[params.g.max_tiles]};
  return {params.pull_offsets[chunk_begin(params, chunk, chunk.index)],
          params.pull_offsets[chunk_begin(params, chunk, chunk.index + 1)]};
}

// By all threads of the CTA: the blocks whose last tile lies in the pipeline chunk. The down GEMM
// walks the dispatch order backwards, and push_blocks lists blocks in the order in which it
// finishes them.
__device__ inline Range blocks_of(const ExchangeParams& params, const PipelineChunk& chunk) {
  const int num_blocks = *params.num_blocks;
  if (chunk.count == 1) return {0, num_blocks};
  const int begin = chunk_begin(params, chunk, chunk.index);
  const int end = chunk_begin(params, chunk, chunk.index + 1);
  Range blocks{0, 0};
  for (int first = 0; first < num_blocks; first += blockDim.x) {
    const int i = first + threadIdx.x;
    const int order_idx = i < num_blocks ? chunk.block_order_idx[params.push_blocks[i]] : -1;
    blocks.first += __syncthreads_count(order_idx >= end);
    blocks.end += __syncthreads_count(order_idx >= begin);
  }
  return blocks;
}

// By a warp: stores this rank's dweight of a token in the home's memory, by shard.
__device__ inline void send_dweight(const ExchangeParams& params, int home, long long token) {
  const int k = threadIdx.x % 32;
  const long long local = token - static_cast<long long>(home) * params.g.max_tokens;
  for (int i = k; i < params.g.topk; i += 32) {
    const int row = params.pair_row[token * params.g.topk + i];
    if (row < 0) continue;
    const int shard = params.world.rank % params.g.tp;
    *dweight_part(params, home, shard, local * params.g.topk + i) = dweight_of_row(params, row);
  }
}

// A pushed block in flight: its flags, one per N-chunk, to signal at the end of the transfer.
struct SentBlock {
  u64* flags;
  u64 transferred_ns;
};

// By one thread, after its subgroup's barrier: releases partials_ready at system scope. The partner
// is home_reduce at the home.
__device__ inline void signal_sent(const ExchangeParams& params, const SentBlock& sent) {
  wait_transferred(sent.transferred_ns);
  fence_system();
  for (int i = 0; i < params.num_n_chunks; ++i) {
    signal(sent.flags + i, params.world.epoch());
  }
}

}  // namespace

// Pulls the tokens of a pipeline chunk: each crosses the link once and is stored to all its rows on
// this rank. The first `lanes` lanes of kPullWarps warps have a stage of shared memory each. With
// chunk 0, the other warps zero the padding rows. Clusters of two, here and in `push`, leave the
// free SMs in pairs, as the GEMM beside them needs.
extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(kThreads, 1)
    dispatch(const __grid_constant__ ExchangeParams params,
             const __grid_constant__ EmulatedLink link, const __grid_constant__ PipelineChunk chunk,
             const __grid_constant__ int lanes) {
  if (!params.state->ok) return;
  extern __shared__ __align__(128) char shared[];
  __shared__ u64 full[kPullWarps * 32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const u32 row_bytes = 2 * params.g.hidden;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kPullWarps * lanes; ++i) mbarrier_init(&full[i], 1);
    mbarrier_init_fence();
  }
  __syncthreads();
  if (warp < kPullWarps) {
    if (lane >= lanes) return;
    const int stage = warp * lanes + lane, stages = kPullWarps * lanes * gridDim.x;
    const Range pulls = pulls_of(params, chunk);
    char* buffer = shared + static_cast<u64>(stage) * row_bytes;
    int i = pulls.first + blockIdx.x * kPullWarps * lanes + stage;
    int next = i < pulls.end ? params.pull_tokens[i] : 0;
    u64 transferred_ns = 0;  // one wait at the end: nothing reads the rows before the launch ends
    for (u32 round = 0; i < pulls.end; i += stages, ++round) {
      const int token = next;
      bulk_wait_read<0>();  // the last stores have read this lane's stage
      const __nv_bfloat16* from =
          params.data<__nv_bfloat16>(token / params.g.max_tokens, params.pull_offset) +
          static_cast<long long>(token % params.g.max_tokens) * params.g.hidden;
      const bool over_link = token / params.g.max_tokens != params.world.rank;
      if (over_link) transferred_ns = max(transferred_ns, begin_transfer(link, row_bytes));
      mbarrier_arrive_expect(&full[stage], row_bytes);
      bulk_load(buffer, from, row_bytes, &full[stage]);
      if (i + stages < pulls.end) next = params.pull_tokens[i + stages];
      mbarrier_wait(&full[stage], round & 1);
      for (int k = 0; k < params.g.topk; ++k) {
        const int row = params.pair_row[static_cast<long long>(token) * params.g.topk + k];
        if (row >= 0)
          bulk_store(params.rows + static_cast<long long>(row) * params.g.hidden, buffer,
                     row_bytes);
      }
      bulk_commit();
    }
    bulk_wait<0>();
    wait_transferred(transferred_ns);
    return;
  }
  if (chunk.index != 0) return;
  zero_padding_rows(params, params.rows, params.g.block_m,
                    blockIdx.x * (kWarps - kPullWarps) + warp - kPullWarps,
                    gridDim.x * (kWarps - kPullWarps));
}

// Sums and pushes token blocks, a subgroup of 256 threads a block: stores the partial rows in the
// home's staging buffer, then signals partials_ready there.
extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(kPushThreads, 1)
    push(const __grid_constant__ ExchangeParams params, const __grid_constant__ EmulatedLink link,
         const __grid_constant__ PipelineChunk chunk) {
  if (!params.state->ok) return;
  const int subgroup = threadIdx.x / kThreads, thread = threadIdx.x % kThreads, warp = thread / 32;
  const int size = *params.block_tokens, num_subgroups = gridDim.x * (kPushThreads / kThreads);
  const Range blocks = blocks_of(params, chunk);
  SentBlock sent{};  // the last block, not signalled yet; of the subgroup's first thread
  // Blocks go to CTAs first, then to subgroups, so that few blocks use many SMs.
  for (int i = blocks.first + subgroup * gridDim.x + blockIdx.x; i < blocks.end;
       i += num_subgroups) {
    const int home = params.push_blocks[i] / params.g.blocks_per_home;
    const int block = params.push_blocks[i] % params.g.blocks_per_home;
    const int first = params.send_offsets[home] + block * size;
    // A rank has no sends to itself, so the next offset ends this home's range.
    const int count = min(size, params.send_offsets[home + 1] - first);
    u64 transferred_ns = 0;
    if (thread == 0) transferred_ns = begin_transfer(link, 2ull * count * params.g.hidden);
    for (int j = warp; j < count; j += kWarps) {
      const long long token = params.send_tokens[first + j];
      const long long row = params.send_base[home] + block * size + j;
      __nv_bfloat16* to =
          params.data<__nv_bfloat16>(home, params.staging_offset) + row * params.g.hidden;
      for (int column = 0; column < params.g.hidden; column += 256 * kVectorsAtOnce) {
        Sums sum = {};
        add_local_rows(params, token, column, sum);
        store_sums(to, sum, column, params.g.hidden);
      }
      if (params.dweight_rows != nullptr) send_dweight(params, home, token);
    }
    named_barrier(1 + subgroup, kThreads);  // orders the block's stores before its signal
    if (thread == 0) {
      if (sent.flags != nullptr) signal_sent(params, sent);
      sent = {params.partials_ready(home, params.world.rank, block), transferred_ns};
      if (transferred_ns == 0) signal_sent(params, sent), sent.flags = nullptr;
    }
  }
  if (sent.flags != nullptr) signal_sent(params, sent);
}

// Reduces this rank's own tokens in fp32, a CTA a token block. The grid has one for each block of
// calls in which no rank has more tokens; blocks may be larger. Order of a sum: local rows in the
// order of k, then contributors by ring distance. Each thread acquires the flags that it checks at
// system scope; the CTA's barrier passes them on.
extern "C" __global__ void __launch_bounds__(kThreads)
    home_reduce(const __grid_constant__ ExchangeParams params) {
  if (!params.state->ok) return;
  const int me = params.world.rank, ranks = params.world.size, size = *params.block_tokens;
  const int first = blockIdx.x * size, count = min(size, params.num_tokens - first);
  if (count <= 0) return;
  const u64 epoch = params.world.epoch();
  bool ok = true;
  for (int i = threadIdx.x; i < count * ranks && ok; i += kThreads) {
    const int row = params.staging_row[first * ranks + i], d = i % ranks;
    if (row < 0) continue;
    const int contributor = (me + d) % ranks, block = (row - params.staging_base[d]) / size;
    const u64* flag = params.partials_ready(me, contributor, block);
    ok = wait_until(params.world, {kPartialsReady, contributor, block, 0}, epoch, epoch,
                    [&] { return acquire(flag); });
  }
  if (!__syncthreads_and(ok)) return;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const __nv_bfloat16* staging = params.data<__nv_bfloat16>(me, params.staging_offset);
  for (int j = warp; j < count; j += kWarps) {
    const int local = first + j;
    const long long token = static_cast<long long>(me) * params.g.max_tokens + local;
    for (int column = 0; column < params.g.hidden; column += 256 * kVectorsAtOnce) {
      Sums sum = {};
      add_local_rows(params, token, column, sum);
      for (int d = 1 + lane; d - lane < ranks; d += 32) {
        const long long row = d < ranks ? params.staging_row[local * ranks + d] : -1;
        const __nv_bfloat16* from = staging + row * params.g.hidden;
        add_rows(sum, row >= 0 ? from : nullptr, 1.0f, column, params.g.hidden);
      }
      store_sums(params.out + static_cast<long long>(local) * params.g.hidden, sum, column,
                 params.g.hidden);
    }
    if (params.dweight_rows == nullptr) continue;
    for (int k = lane; k < params.g.topk; k += 32) {
      const long long pair = static_cast<long long>(local) * params.g.topk + k;
      params.out_dweight[pair] =
          sum_dweight_parts(params, pair, params.pair_row[token * params.g.topk + k]);
    }
  }
}
