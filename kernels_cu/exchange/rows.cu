// Rows on their way: pulled from their homes, summed and pushed back, added up at home. A launch
// moves all of a call or a part of it, on the whole partition or beside a GEMM; movers of the
// fused kernels do the same.
#include "comm/pacing.cuh"
#include "comm/wait.cuh"
#include "exchange/pads.cuh"
#include "exchange/sums.cuh"
#include "hopper/bulk.cuh"
#include "schedule/parts.cuh"

using namespace cometrt;

namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kPullWarps = 4;
constexpr int kPushThreads = 768;  // fill an SM: others stay free for a GEMM beside them
constexpr int kColumnsAtOnce = 4;  // of 256, a warp

using Sums = float[kColumnsAtOnce][8];  // of columns first + 256 * i + 8 * lane

// The rows that the lanes of a warp hold (null: none), times their weights, in the order of lanes.
__device__ inline void add_rows(Sums& sum, const __nv_bfloat16* mine, float weight_of_mine,
                                int first, int hidden) {
  const int column = first + threadIdx.x % 32 * 8;
  for (u32 left = __ballot_sync(~0u, mine != nullptr); left != 0; left &= left - 1) {
    const int from = __ffs(left) - 1;
    const u64 address = __shfl_sync(~0u, reinterpret_cast<u64>(mine), from);
    const float weight = __shfl_sync(~0u, weight_of_mine, from);
    const __nv_bfloat16* row = reinterpret_cast<const __nv_bfloat16*>(address) + column;
    uint4 packed[kColumnsAtOnce];  // loads together
#pragma unroll
    for (int i = 0; i < kColumnsAtOnce; ++i) {
      packed[i] = column + 256 * i < hidden ? *reinterpret_cast<const uint4*>(row + 256 * i)
                                            : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int i = 0; i < kColumnsAtOnce; ++i) add_packed(sum[i], packed[i], weight);
  }
}

// A token's rows on this rank in the order of k.
__device__ inline void add_local_rows(const Call& c, long long token, int first, Sums& sum) {
  const int lane = threadIdx.x % 32;
  for (int k = lane; k - lane < c.g.topk; k += 32) {
    const int row = k < c.g.topk ? c.pair_row[token * c.g.topk + k] : -1;
    const float weight = row >= 0 && c.weighted ? c.row_weight[row] : 1.0f;
    const __nv_bfloat16* from = c.partial_rows + static_cast<long long>(row) * c.g.hidden;
    add_rows(sum, row >= 0 ? from : nullptr, weight, first, c.g.hidden);
  }
}

__device__ inline void store_sums(__nv_bfloat16* row, const Sums& sum, int first, int hidden) {
  const int column = first + threadIdx.x % 32 * 8;
#pragma unroll
  for (int i = 0; i < kColumnsAtOnce; ++i) {
    if (column + 256 * i < hidden) store_row(row + column + 256 * i, sum[i]);
  }
}

// Places [first, end) of a call's pulls or blocks.
struct Stretch {
  int first, end;
};

__device__ inline int part_position(const Call& c, const Part& part, int index) {
  return part_begin(c.expert_offsets[c.g.local_experts] / c.g.block_m, index, part.count);
}

// What tiles of the part are the first to need.
__device__ inline Stretch pulls_of(const Call& c, const Part& part) {
  if (part.count == 1) return {0, c.pull_offsets[c.g.max_tiles]};
  return {c.pull_offsets[part_position(c, part, part.index)],
          c.pull_offsets[part_position(c, part, part.index + 1)]};
}

// Blocks that are complete with the part, when later parts are: layer1 walks backwards, and blocks
// lie in the order in which it finishes them. By all threads of the CTA.
__device__ inline Stretch blocks_of(const Call& c, const Part& part) {
  const int num_blocks = *c.num_blocks;
  if (part.count == 1) return {0, num_blocks};
  const int begin = part_position(c, part, part.index);
  const int end = part_position(c, part, part.index + 1);
  Stretch blocks{0, 0};
  for (int first = 0; first < num_blocks; first += blockDim.x) {
    const int i = first + threadIdx.x;
    const int position = i < num_blocks ? part.block_position[c.push_blocks[i]] : -1;
    blocks.first += __syncthreads_count(position >= end);
    blocks.end += __syncthreads_count(position >= begin);
  }
  return blocks;
}

__device__ inline void send_dweight(const Call& c, int home, long long token) {
  const int k = threadIdx.x % 32;
  const long long local = token - static_cast<long long>(home) * c.g.max_tokens;
  for (int i = k; i < c.g.topk; i += 32) {
    const int row = c.pair_row[token * c.g.topk + i];
    if (row < 0) continue;
    float* part = c.data<float>(home, c.dweight_at);
    const long long shard = c.world.rank % c.g.tp;
    part[(shard * c.g.max_tokens + local) * c.g.topk + i] = c.dweight_rows[row];
  }
}

// A block on its way; its flags, one a chunk, are released when it has crossed.
struct Sent {
  u64* flags;
  u64 crossed_ns;
};

__device__ inline void release(const Call& c, const Sent& sent) {
  if (sent.crossed_ns != 0) wait_crossed(sent.crossed_ns);
  fence_acq_rel_sys();
  for (int chunk = 0; chunk < c.num_chunks; ++chunk) {
    store_release_sys(sent.flags + chunk, c.world.epoch());
  }
}

}  // namespace

// Every needed token crosses once and is written to all its rows; with the first part, pads become
// zero. A slot of shared memory for each of the first `lanes` lanes of four warps; the other warps
// write pads. Clusters of two, here and in `push`: what is left free of a partition are pairs of
// SMs, as the engine needs them.
extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(kThreads, 1)
    dispatch(const __grid_constant__ Call c, const __grid_constant__ Pace pace,
             const __grid_constant__ Part part, const __grid_constant__ int lanes) {
  if (!c.state->ok) return;
  extern __shared__ __align__(128) char shared[];
  __shared__ u64 full[kPullWarps * 32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const u32 row_bytes = 2 * c.g.hidden;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kPullWarps * lanes; ++i) mbarrier_init(&full[i], 1);
    mbarrier_init_fence();
  }
  __syncthreads();
  if (warp < kPullWarps) {
    if (lane >= lanes) return;
    const int slot = warp * lanes + lane, slots = kPullWarps * lanes * gridDim.x;
    const Stretch pulls = pulls_of(c, part);
    char* buffer = shared + static_cast<u64>(slot) * row_bytes;
    int i = pulls.first + blockIdx.x * kPullWarps * lanes + slot;
    int next = i < pulls.end ? c.pull_tokens[i] : 0;
    u64 all_crossed_ns = 0;  // nothing reads rows before the launch ends: one wait for the link
    for (u32 round = 0; i < pulls.end; i += slots, ++round) {
      const int token = next;
      bulk_wait_read<0>();  // this slot's last stores have left it
      const __nv_bfloat16* from = c.data<__nv_bfloat16>(token / c.g.max_tokens, c.pull_at) +
                                  static_cast<long long>(token % c.g.max_tokens) * c.g.hidden;
      const bool crosses = token / c.g.max_tokens != c.world.rank;
      if (crosses) all_crossed_ns = max(all_crossed_ns, reserve_link(pace, row_bytes));
      mbarrier_arrive_expect(&full[slot], row_bytes);
      bulk_load(buffer, from, row_bytes, &full[slot]);
      if (i + slots < pulls.end) next = c.pull_tokens[i + slots];
      mbarrier_wait(&full[slot], round & 1);
      for (int k = 0; k < c.g.topk; ++k) {
        const int row = c.pair_row[static_cast<long long>(token) * c.g.topk + k];
        if (row >= 0)
          bulk_store(c.rows + static_cast<long long>(row) * c.g.hidden, buffer, row_bytes);
      }
      bulk_commit();
    }
    bulk_wait<0>();
    wait_crossed(all_crossed_ns);
    return;
  }
  if (part.index != 0) return;
  zero_pad_rows(c, blockIdx.x * (kWarps - kPullWarps) + warp - kPullWarps,
                gridDim.x * (kWarps - kPullWarps));
}

// A team of 256 threads a block of tokens: partial rows to the home's staging, then the release of
// partials_ready. Acquired by `home_reduce`.
extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(kPushThreads, 1)
    push(const __grid_constant__ Call c, const __grid_constant__ Pace pace,
         const __grid_constant__ Part part) {
  if (!c.state->ok) return;
  const int team = threadIdx.x / kThreads, thread = threadIdx.x % kThreads, warp = thread / 32;
  const int size = c.g.block_tokens, num_teams = gridDim.x * (kPushThreads / kThreads);
  const Stretch blocks = blocks_of(c, part);
  Sent sent{};  // the last block, where the link has not let it pass yet; one thread's
  // Teams of one CTA are far apart, so that few blocks spread over all CTAs.
  for (int i = blocks.first + team * gridDim.x + blockIdx.x; i < blocks.end; i += num_teams) {
    const int home = c.push_blocks[i] / c.g.blocks_per_home;
    const int block = c.push_blocks[i] % c.g.blocks_per_home;
    const int first = c.send_offsets[home] + block * size;
    // Offsets of this rank itself are empty, so the next one ends this home's.
    const int count = min(size, c.send_offsets[home + 1] - first);
    u64 crossed_ns = 0;
    if (thread == 0) crossed_ns = reserve_link(pace, 2ull * count * c.g.hidden);
    for (int j = warp; j < count; j += kWarps) {
      const long long token = c.send_tokens[first + j];
      const long long slot = c.send_base[home] + block * size + j;
      __nv_bfloat16* to = c.data<__nv_bfloat16>(home, c.staging_at) + slot * c.g.hidden;
      for (int column = 0; column < c.g.hidden; column += 256 * kColumnsAtOnce) {
        Sums sum = {};
        add_local_rows(c, token, column, sum);
        store_sums(to, sum, column, c.g.hidden);
      }
      if (c.dweight_rows != nullptr) send_dweight(c, home, token);
    }
    named_barrier(1 + team, kThreads);  // all stores of the block happen before its release
    if (thread == 0) {
      if (sent.flags != nullptr) release(c, sent);
      sent = {c.partials_ready(home, c.world.rank, block), crossed_ns};
      if (crossed_ns == 0) release(c, sent), sent.flags = nullptr;
    }
  }
  if (sent.flags != nullptr) release(c, sent);
}

// A block of threads a block of this rank's tokens: own rows first, in fp32, then the
// contributors by ring distance. Acquires partials_ready.
extern "C" __global__ void __launch_bounds__(kThreads) home_reduce(const __grid_constant__ Call c) {
  if (!c.state->ok) return;
  const int me = c.world.rank, ranks = c.world.size, size = c.g.block_tokens;
  const int first = blockIdx.x * size, count = min(size, c.num_tokens - first);
  const u64 epoch = c.world.epoch();
  bool ok = true;
  for (int i = threadIdx.x; i < count * ranks && ok; i += kThreads) {
    const int slot = c.home_slot[first * ranks + i], d = i % ranks;
    if (slot < 0) continue;
    const int contributor = (me + d) % ranks, block = (slot - c.home_base[d]) / size;
    const u64* flag = c.partials_ready(me, contributor, block);
    ok = wait_until(c.world, {kPartialsReady, contributor, block, 0}, epoch, epoch,
                    [&] { return load_acquire_sys(flag); });
  }
  if (!__syncthreads_and(ok)) return;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const __nv_bfloat16* staging = c.data<__nv_bfloat16>(me, c.staging_at);
  for (int j = warp; j < count; j += kWarps) {
    const int local = first + j;
    const long long token = static_cast<long long>(me) * c.g.max_tokens + local;
    for (int column = 0; column < c.g.hidden; column += 256 * kColumnsAtOnce) {
      Sums sum = {};
      add_local_rows(c, token, column, sum);
      for (int d = 1 + lane; d - lane < ranks; d += 32) {
        const long long slot = d < ranks ? c.home_slot[local * ranks + d] : -1;
        const __nv_bfloat16* from = staging + slot * c.g.hidden;
        add_rows(sum, slot >= 0 ? from : nullptr, 1.0f, column, c.g.hidden);
      }
      store_sums(c.out + static_cast<long long>(local) * c.g.hidden, sum, column, c.g.hidden);
    }
    if (c.dweight_rows == nullptr) continue;
    send_dweight(c, me, token);
    __syncwarp();
    for (int k = lane; k < c.g.topk; k += 32) {
      const float* part = c.data<float>(me, c.dweight_at);
      const long long at = static_cast<long long>(local) * c.g.topk + k;
      float sum = part[at];
      for (long long shard = 1; shard < c.g.tp; ++shard) {
        sum += part[shard * c.g.max_tokens * c.g.topk + at];
      }
      c.out_dweight[at] = sum;
    }
  }
}
