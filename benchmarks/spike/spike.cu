// The riskiest idea, small: comm CTAs pull rows by bulk copies and release tiles; compute CTAs
// acquire them through TMA and multiply; comm CTAs push partial rows and add them up at home.
// One launch per rank, all ranks at once on partitions of one GPU.
#include <cuda_bf16.h>

#include "comm/pacing.cuh"
#include "comm/wait.cuh"
#include "hopper/bulk.cuh"
#include "hopper/memory.cuh"
#include "hopper/wgmma.cuh"

using namespace cometrt;

constexpr int kRanks = 4;
constexpr int BLOCK_M = 128, BLOCK_N = 128, BLOCK_K = 64;
constexpr int kStages = 4;
constexpr int kStageBytes = (BLOCK_M + BLOCK_N) * BLOCK_K * 2;
constexpr int kThreads = 384;  // a producer warpgroup and two consumers, or all of them comm
constexpr int kSlots = 32;     // rows in flight of a comm CTA
constexpr int kRowsPerToken = 2;
constexpr int kBlockTokens = 16;

struct SpikeParams {
  World world;
  u64 epoch;
  Pace pull_pace, push_pace;
  const __nv_bfloat16* x[kRanks];  // [tokens, hidden] of every rank
  __nv_bfloat16* rows;             // [num_tiles * BLOCK_M, hidden]
  const int* row_source;           // [rows] rank * tokens + token
  u32* tile_filled;                // [num_tiles]
  u32* tile_done;                  // [num_tiles]
  __nv_bfloat16* o;                // [num_tiles * BLOCK_M, BLOCK_N]
  const int* token_rows;           // [ranks * tokens, kRowsPerToken]
  __nv_bfloat16* staging[kRanks];  // [contributor, tokens, BLOCK_N] at every home
  u64* partials_ready[kRanks];     // [contributor, tokens / kBlockTokens] at every home
  __nv_bfloat16* y;                // [tokens, BLOCK_N]
  u32* ticket;
  u64* span_ns;  // [2]: first start, last end
  int tokens, hidden, num_tiles, num_comm, stall_tile, stall_rank;
};

// ---- comm: pull ---------------------------------------------------------------------------------

constexpr int kPullWarps = 4, kPullLanes = kSlots / kPullWarps;

// Warps 0 to 3, a slot of shared memory for each of their first lanes; a round moves a row a
// lane. Warps run apart, so that one's loads overlap another's stores. `row_of(i)` is where row i
// comes from, `to(i)` where it goes. One lane a warp and round calls `reserve(i)` when the round's
// loads are issued, and `stored(i, what reserve gave)` once its rows are complete.
template <typename RowOf, typename To, typename Reserve, typename Stored>
__device__ inline void copy_through_shared(char* shared, u64* full, int num_rows, u32 row_bytes,
                                           RowOf row_of, To to, Reserve reserve, Stored stored) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (warp >= kPullWarps || lane >= kPullLanes) return;
  constexpr u32 kLanes = (1u << kPullLanes) - 1;
  const int slot = warp * kPullLanes + lane;
  char* buffer = shared + slot * row_bytes;
  const char* next = slot < num_rows ? row_of(slot) : nullptr;
  u64 crossed = 0, crossed_before = 0;
  for (int i = slot, round = 0; i < num_rows; i += kSlots, ++round) {
    bulk_wait_read<0>();  // this slot's last store has left it
    mbarrier_arrive_expect(&full[slot], row_bytes);
    bulk_load(buffer, next, row_bytes, &full[slot]);
    crossed_before = crossed;
    if (lane == 0) crossed = reserve(i);
    if (i + kSlots < num_rows) next = row_of(i + kSlots);  // its latency hides under the load
    mbarrier_wait(&full[slot], round & 1);
    bulk_store(to(i), buffer, row_bytes);
    bulk_commit();
    if (round > 0) {
      bulk_wait<1>();  // all but the store just issued
      __syncwarp(kLanes);
      if (lane == 0) stored(i - kSlots, crossed_before);
    }
  }
  bulk_wait<0>();
  __syncwarp(kLanes);
  const int rounds = num_rows / kSlots;
  if (lane == 0 && rounds > 0) stored((rounds - 1) * kSlots + warp * kPullLanes, crossed);
}

__device__ void pull_tiles(const SpikeParams& p, char* shared, u64* full, int comm_idx) {
  const u32 row_bytes = p.hidden * 2;
  const int my_tiles = (p.num_tiles - comm_idx + p.num_comm - 1) / p.num_comm;
  const auto row = [&](int i) {
    return static_cast<long long>(comm_idx + i / BLOCK_M * p.num_comm) * BLOCK_M + i % BLOCK_M;
  };
  int num_rows = my_tiles * BLOCK_M;
  if (p.world.rank == p.stall_rank && p.stall_tile % p.num_comm == comm_idx) {
    num_rows = p.stall_tile / p.num_comm * BLOCK_M;
  }
  copy_through_shared(
      shared, full, num_rows, row_bytes,
      [&](int i) {
        const int source = p.row_source[row(i)];
        return reinterpret_cast<const char*>(p.x[source / p.tokens] +
                                             static_cast<long long>(source % p.tokens) * p.hidden);
      },
      [&](int i) { return p.rows + row(i) * p.hidden; },
      [&](int i) {
        const bool local = p.row_source[row(i)] / p.tokens == p.world.rank;
        return reserve_link(p.pull_pace, local ? 0 : static_cast<u64>(kPullLanes) * row_bytes);
      },
      [&](int i, u64 crossed) {
        wait_crossed(crossed);
        add_release_gpu(&p.tile_filled[row(i) / BLOCK_M], kPullLanes);
      });
}

// ---- comm: combine ------------------------------------------------------------------------------

__device__ inline void add_row(float (&sum)[8], const __nv_bfloat16* row) {
  const uint4 packed = *reinterpret_cast<const uint4*>(row);
  const __nv_bfloat162* pairs = reinterpret_cast<const __nv_bfloat162*>(&packed);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 two = __bfloat1622float2(pairs[i]);
    sum[2 * i] += two.x;
    sum[2 * i + 1] += two.y;
  }
}

__device__ inline void store_row(__nv_bfloat16* row, const float (&sum)[8]) {
  uint4 packed;
  __nv_bfloat162* pairs = reinterpret_cast<__nv_bfloat162*>(&packed);
#pragma unroll
  for (int i = 0; i < 4; ++i) pairs[i] = __floats2bfloat162_rn(sum[2 * i], sum[2 * i + 1]);
  *reinterpret_cast<uint4*>(row) = packed;
}

// Returns false on every thread of the block if a wait ended without its flag.
__device__ bool wait_rows(const SpikeParams& p, int first_token) {
  bool ok = true;
  if (threadIdx.x < kBlockTokens * kRowsPerToken) {
    const int tile = p.token_rows[first_token * kRowsPerToken + threadIdx.x] / BLOCK_M;
    ok = wait_until(p.world, {kTileDone, p.world.rank, tile, 0}, p.epoch, 1,
                    [&] { return load_acquire_gpu(&p.tile_done[tile]); });
  }
  return __syncthreads_and(ok);
}

__device__ void add_local(const SpikeParams& p, int token, int column, float (&sum)[8]) {
  for (int k = 0; k < kRowsPerToken; ++k) {
    const int row = p.token_rows[token * kRowsPerToken + k];
    add_row(sum, p.o + static_cast<long long>(row) * BLOCK_N + column);
  }
}

__device__ bool push_block(const SpikeParams& p, int home, int block) {
  const int first = home * p.tokens + block * kBlockTokens, me = p.world.rank;
  if (!wait_rows(p, first)) return false;
  for (int i = threadIdx.x; i < kBlockTokens * BLOCK_N / 8; i += kThreads) {
    const int token = i / (BLOCK_N / 8), column = i % (BLOCK_N / 8) * 8;
    float sum[8] = {};
    add_local(p, first + token, column, sum);
    const long long slot = static_cast<long long>(me) * p.tokens + block * kBlockTokens + token;
    store_row(p.staging[home] + slot * BLOCK_N + column, sum);
  }
  __syncthreads();  // all stores of the block happen before the release by thread 0
  if (threadIdx.x == 0) {
    wait_crossed(reserve_link(p.push_pace, kBlockTokens * BLOCK_N * 2));
    fence_acq_rel_sys();
    store_release_sys(&p.partials_ready[home][me * (p.tokens / kBlockTokens) + block], p.epoch);
  }
  return true;
}

__device__ bool home_block(const SpikeParams& p, int block) {
  const int me = p.world.rank, first = block * kBlockTokens;
  if (!wait_rows(p, me * p.tokens + first)) return false;
  bool ok = true;
  if (threadIdx.x < kRanks && static_cast<int>(threadIdx.x) != me) {
    const u64* flag = &p.partials_ready[me][threadIdx.x * (p.tokens / kBlockTokens) + block];
    ok = wait_until(p.world, {kPartialsReady, static_cast<int>(threadIdx.x), block, 0}, p.epoch,
                    p.epoch, [&] { return load_acquire_sys(flag); });
  }
  if (!__syncthreads_and(ok)) return false;
  for (int i = threadIdx.x; i < kBlockTokens * BLOCK_N / 8; i += kThreads) {
    const int token = first + i / (BLOCK_N / 8), column = i % (BLOCK_N / 8) * 8;
    float sum[8] = {};
    add_local(p, me * p.tokens + token, column, sum);
    for (int d = 1; d < kRanks; ++d) {
      const long long slot = static_cast<long long>((me + d) % kRanks) * p.tokens + token;
      add_row(sum, p.staging[me] + slot * BLOCK_N + column);
    }
    store_row(p.y + static_cast<long long>(token) * BLOCK_N + column, sum);
  }
  return true;
}

__device__ void comm_role(const SpikeParams& p, char* shared, u64* full, int comm_idx) {
  pull_tiles(p, shared, full, comm_idx);
  __syncthreads();
  const int blocks = p.tokens / kBlockTokens;
  for (int item = comm_idx; item < (kRanks - 1) * blocks; item += p.num_comm) {
    const int home = (p.world.rank + kRanks - 1 - item / blocks) % kRanks;  // farthest first
    if (!push_block(p, home, item % blocks)) return;
  }
  for (int block = comm_idx; block < blocks; block += p.num_comm) {
    if (!home_block(p, block)) return;
  }
}

// ---- compute ------------------------------------------------------------------------------------

__device__ void produce(const SpikeParams& p, const TensorMap* a_map, const TensorMap* b_map,
                        char* shared, u64* full, u64* empty, int compute_idx, int num_compute,
                        volatile int* stopped) {
  int it = 0;
  for (int tile = num_compute - 1 - compute_idx; tile < p.num_tiles; tile += num_compute) {
    const bool ok = wait_until(p.world, {kTileFilled, p.world.rank, tile, -1}, p.epoch, BLOCK_M,
                               [&] { return load_acquire_gpu(&p.tile_filled[tile]); });
    if (!ok) {
      *stopped = 1;  // the consumers see it with the next full stage
    }
    fence_proxy_async();  // rows were acquired by ordinary loads and are read by TMA
    for (int k = 0; k < p.hidden / BLOCK_K; ++k, ++it) {
      const int stage = it % kStages;
      if (it >= kStages) mbarrier_wait(&empty[stage], (it / kStages - 1) & 1);
      char* a = shared + stage * kStageBytes;
      if (!ok) {
        mbarrier_arrive(&full[stage]);
        return;
      }
      mbarrier_arrive_expect(&full[stage], kStageBytes);
      tensor_load_2d(a, a_map, k * BLOCK_K, tile * BLOCK_M, &full[stage]);
      tensor_load_2d(a + BLOCK_M * BLOCK_K * 2, b_map, k * BLOCK_K, 0, &full[stage]);
    }
  }
}

__device__ void consume(const SpikeParams& p, char* shared, u64* full, u64* empty, int compute_idx,
                        int num_compute, volatile int* stopped) {
  const int group = threadIdx.x / 128 - 1, lane = threadIdx.x % 128;
  int it = 0;
  for (int tile = num_compute - 1 - compute_idx; tile < p.num_tiles; tile += num_compute) {
    float d[64];
    for (int k = 0; k < p.hidden / BLOCK_K; ++k, ++it) {
      const int stage = it % kStages;
      mbarrier_wait(&full[stage], it / kStages & 1);
      if (*stopped) return;
      const char* a = shared + stage * kStageBytes;
      const u64 a_desc = wgmma_descriptor(a + group * 64 * BLOCK_K * 2);
      const u64 b_desc = wgmma_descriptor(a + BLOCK_M * BLOCK_K * 2);
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < BLOCK_K / 16; ++step) {
        wgmma_m64n128k16(d, a_desc + 2 * step, b_desc + 2 * step, k > 0 || step > 0);
      }
      wgmma_commit();
      wgmma_wait<0>();
      if (lane == 0) mbarrier_arrive(&empty[stage]);
    }
    const int row = tile * BLOCK_M + group * 64 + lane / 32 * 16 + lane % 32 / 4;
#pragma unroll
    for (int i = 0; i < 64; i += 2) {
      const int r = row + 8 * (i / 2 % 2), c = 8 * (i / 4) + 2 * (lane % 4);
      *reinterpret_cast<__nv_bfloat162*>(p.o + static_cast<long long>(r) * BLOCK_N + c) =
          __floats2bfloat162_rn(d[i], d[i + 1]);
    }
    named_barrier(1, 256);  // both halves of the tile are stored
    if (threadIdx.x == 128) add_release_gpu(&p.tile_done[tile], 1);
  }
}

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    fused(const __grid_constant__ SpikeParams p, const __grid_constant__ TensorMap a_map,
          const __grid_constant__ TensorMap b_map) {
  extern __shared__ __align__(1024) char shared[];
  __shared__ u64 full[kSlots], empty[kStages];
  __shared__ int arrival, stopped;
  if (threadIdx.x == 0) {
    arrival = atomicAdd(p.ticket, 1u);
    stopped = 0;
    atomicMin(&p.span_ns[0], global_timer_ns());
    for (int i = 0; i < kSlots; ++i) mbarrier_init(&full[i], 1);
    for (int i = 0; i < kStages; ++i) mbarrier_init(&empty[i], 2);
    mbarrier_init_fence();
  }
  __syncthreads();
  const int num_compute = gridDim.x - p.num_comm;
  if (arrival < p.num_comm) {
    comm_role(p, shared, full, arrival);
  } else if (threadIdx.x == 0) {
    produce(p, &a_map, &b_map, shared, full, empty, arrival - p.num_comm, num_compute, &stopped);
  } else if (threadIdx.x >= 128) {
    consume(p, shared, full, empty, arrival - p.num_comm, num_compute, &stopped);
  }
  __syncthreads();
  if (threadIdx.x == 0) atomicMax(&p.span_ns[1], global_timer_ns());
}

// ---- single measurements ------------------------------------------------------------------------

// Each CTA moves its share of the rows, in random order, as pull_tiles does.
extern "C" __global__ void __launch_bounds__(kThreads, 1)
    copy_rows(const char* from, char* to, const int* order, int num_rows, int row_bytes,
              u64* free_at_ns, u64 picoseconds_per_byte) {
  extern __shared__ __align__(1024) char shared[];
  __shared__ u64 full[kSlots];
  if (threadIdx.x == 0) {
    for (int i = 0; i < kSlots; ++i) mbarrier_init(&full[i], 1);
    mbarrier_init_fence();
  }
  __syncthreads();
  const int mine = num_rows / gridDim.x;
  const long long first = static_cast<long long>(blockIdx.x) * mine;
  copy_through_shared(
      shared, full, mine, row_bytes,
      [&](int i) { return from + static_cast<long long>(order[first + i]) * row_bytes; },
      [&](int i) { return to + (first + i) * row_bytes; },
      [&](int) {
        return reserve_link({free_at_ns, picoseconds_per_byte},
                            static_cast<u64>(kPullLanes) * row_bytes);
      },
      [&](int, u64 crossed) { wait_crossed(crossed); });
}

// out[t] = sum of kTerms rows index[t, :] of `rows`, fp32 inside: reduce-and-push, home reduce.
// A warp a token; a lane has all its loads of kVectors * kTerms * 16 bytes in flight.
template <int kTerms>
__device__ inline void sum_rows(const __nv_bfloat16* rows, const int* index, __nv_bfloat16* out,
                                int num_tokens, int columns) {
  constexpr int kVectors = 4;
  const int warps = gridDim.x * (kThreads / 32), lane = threadIdx.x % 32;
  for (int token = (blockIdx.x * kThreads + threadIdx.x) / 32; token < num_tokens; token += warps) {
    long long row[kTerms];
#pragma unroll
    for (int k = 0; k < kTerms; ++k) {
      row[k] = static_cast<long long>(index[token * kTerms + k]) * columns;
    }
    for (int begin = lane * 8; begin < columns; begin += 32 * 8 * kVectors) {
      uint4 packed[kVectors][kTerms];
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
#pragma unroll
        for (int k = 0; k < kTerms; ++k) {
          packed[v][k] = *reinterpret_cast<const uint4*>(rows + row[k] + begin + v * 256);
        }
      }
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        float sum[8] = {};
#pragma unroll
        for (int k = 0; k < kTerms; ++k) {
          add_row(sum, reinterpret_cast<const __nv_bfloat16*>(&packed[v][k]));
        }
        store_row(out + static_cast<long long>(token) * columns + begin + v * 256, sum);
      }
    }
  }
}

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    sum_2_rows(const __nv_bfloat16* rows, const int* index, __nv_bfloat16* out, int num_tokens,
               int columns) {
  sum_rows<2>(rows, index, out, num_tokens, columns);
}

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    sum_4_rows(const __nv_bfloat16* rows, const int* index, __nv_bfloat16* out, int num_tokens,
               int columns) {
  sum_rows<4>(rows, index, out, num_tokens, columns);
}

// Two ranks hand a number to and fro; one CTA each, on its own partition.
extern "C" __global__ void ping_pong(u64* mine, u64* theirs, int hops, int first, u64* ns) {
  const u64 begin = global_timer_ns(), deadline = begin + 2000000000ull;
  for (int hop = 1; hop <= hops; ++hop) {
    if ((hop & 1) == first) {
      store_release_sys(theirs, hop);
    } else {
      for (u32 polls = 1; load_acquire_sys(mine) < static_cast<u64>(hop); ++polls) {
        if (polls % 64 == 0 && global_timer_ns() > deadline) return;
      }
    }
  }
  *ns = global_timer_ns() - begin;
}
