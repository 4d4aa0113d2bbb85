// Rows on their way: pulled from their homes, summed and pushed back, added up at home. Each
// launch has the whole partition; the fused kernels do the same in their comm role.
#include "comm/pacing.cuh"
#include "comm/wait.cuh"
#include "exchange/pads.cuh"
#include "exchange/sums.cuh"
#include "hopper/bulk.cuh"

using namespace cometrt;

namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kPullWarps = 4;

// A token's rows on this rank in the order of k; `column` of 8.
__device__ inline void add_local_rows(const Call& c, long long token, int column, float (&sum)[8]) {
  for (int k = 0; k < c.g.topk; ++k) {
    const int row = c.pair_row[token * c.g.topk + k];
    if (row < 0) continue;
    const float weight = c.weighted ? c.row_weight[row] : 1.0f;
    add_row(sum, c.partial_rows + static_cast<long long>(row) * c.g.hidden + column, weight);
  }
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

}  // namespace

// Every needed token crosses once and is written to all its rows; pads become zero. A slot of
// shared memory for each of the first `lanes` lanes of four warps; the other warps write pads.
extern "C" __global__ void __launch_bounds__(kThreads, 1)
    dispatch(const __grid_constant__ Call c, const __grid_constant__ Pace pace,
             const __grid_constant__ int lanes) {
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
    const int num_pulls = c.pull_offsets[c.g.max_tiles];
    char* buffer = shared + static_cast<u64>(slot) * row_bytes;
    int i = blockIdx.x * kPullWarps * lanes + slot;
    int next = i < num_pulls ? c.pull_tokens[i] : 0;
    for (u32 round = 0; i < num_pulls; i += slots, ++round) {
      const int token = next;
      bulk_wait_read<0>();  // this slot's last stores have left it
      const __nv_bfloat16* from = c.data<__nv_bfloat16>(token / c.g.max_tokens, c.pull_at) +
                                  static_cast<long long>(token % c.g.max_tokens) * c.g.hidden;
      const bool crosses = token / c.g.max_tokens != c.world.rank;
      const u64 crossed_ns = crosses ? reserve_link(pace, row_bytes) : 0;
      mbarrier_arrive_expect(&full[slot], row_bytes);
      bulk_load(buffer, from, row_bytes, &full[slot]);
      if (i + slots < num_pulls) next = c.pull_tokens[i + slots];
      mbarrier_wait(&full[slot], round & 1);
      if (crossed_ns != 0) wait_crossed(crossed_ns);
      for (int k = 0; k < c.g.topk; ++k) {
        const int row = c.pair_row[static_cast<long long>(token) * c.g.topk + k];
        if (row >= 0)
          bulk_store(c.rows + static_cast<long long>(row) * c.g.hidden, buffer, row_bytes);
      }
      bulk_commit();
    }
    bulk_wait<0>();
    return;
  }
  zero_pad_rows(c, blockIdx.x * (kWarps - kPullWarps) + warp - kPullWarps,
                gridDim.x * (kWarps - kPullWarps));
}

// A block of threads a block of tokens: partial rows to the home's staging, then the release of
// partials_ready. Acquired by `home_reduce`.
extern "C" __global__ void __launch_bounds__(kThreads)
    push(const __grid_constant__ Call c, const __grid_constant__ Pace pace) {
  if (!c.state->ok) return;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, size = c.g.block_tokens;
  for (int i = blockIdx.x; i < *c.num_blocks; i += gridDim.x) {
    const int home = c.push_blocks[i] / c.g.blocks_per_home;
    const int block = c.push_blocks[i] % c.g.blocks_per_home;
    const int first = c.send_offsets[home] + block * size;
    // Offsets of this rank itself are empty, so the next one ends this home's.
    const int count = min(size, c.send_offsets[home + 1] - first);
    u64 crossed_ns = 0;
    if (threadIdx.x == 0) crossed_ns = reserve_link(pace, 2ull * count * c.g.hidden);
    for (int j = warp; j < count; j += kWarps) {
      const long long token = c.send_tokens[first + j];
      const long long slot = c.send_base[home] + block * size + j;
      __nv_bfloat16* to = c.data<__nv_bfloat16>(home, c.staging_at) + slot * c.g.hidden;
      for (int column = lane * 8; column < c.g.hidden; column += 256) {
        float sum[8] = {};
        add_local_rows(c, token, column, sum);
        store_row(to + column, sum);
      }
      if (c.dweight_rows != nullptr) send_dweight(c, home, token);
    }
    __syncthreads();  // all stores of the block happen before its release
    if (threadIdx.x == 0) {
      if (crossed_ns != 0) wait_crossed(crossed_ns);
      fence_acq_rel_sys();
      for (int chunk = 0; chunk < c.num_chunks; ++chunk) {
        store_release_sys(c.partials_ready(home, c.world.rank, block) + chunk, c.world.epoch());
      }
    }
  }
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
    for (int column = lane * 8; column < c.g.hidden; column += 256) {
      float sum[8] = {};
      add_local_rows(c, token, column, sum);
      for (int d = 1; d < ranks; ++d) {
        const long long slot = c.home_slot[local * ranks + d];
        if (slot >= 0) add_row(sum, staging + slot * c.g.hidden + column, 1.0f);
      }
      store_row(c.out + static_cast<long long>(local) * c.g.hidden + column, sum);
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
