// What a link between two ranks carries when kernels use it as the exchange does, and how long a
// flag or a load takes to cross.
#include "hopper/bulk.cuh"

using namespace cometrt;

namespace {

constexpr int kMaxStages = 64;
constexpr u32 kCopyChunkBytes = 4096;  // as in fused/dispatch_warp.cuh
constexpr u64 kDeadlineNs = 2000000000;

// One warp. False: the flag was not signalled before the deadline.
__device__ bool wait_flag(const u64* flag, u64 expected) {
  bool arrived = true;
  if (threadIdx.x == 0) {
    const u64 begin = global_timer_ns();
    while (arrived && load_acquire_sys(flag) < expected)
      arrived = global_timer_ns() - begin < kDeadlineNs;
  }
  return __shfl_sync(~0u, arrived, 0);
}

}  // namespace

// Bulk copies as DispatchWarp makes them, from a peer's memory into this GPU's. The first `lanes`
// lanes of each warp work, each with a copy stage of its own. `bytes` is a multiple of a copy
// chunk.
extern "C" __global__ void pull(char* to, const char* from, u64 bytes, int lanes) {
  extern __shared__ __align__(128) char shared[];
  __shared__ u64 full[kMaxStages];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, stage = warp * lanes + lane;
  const int stages = static_cast<int>(blockDim.x) / 32 * lanes;
  if (threadIdx.x == 0) {
    for (int i = 0; i < stages; ++i) mbarrier_init(&full[i], 1);
    mbarrier_init_fence();
  }
  __syncthreads();
  if (lane >= lanes) return;
  char* buffer = shared + static_cast<u64>(stage) * kCopyChunkBytes;
  u32 phase = 0;
  for (u64 at = (static_cast<u64>(blockIdx.x) * stages + stage) * kCopyChunkBytes; at < bytes;
       at += static_cast<u64>(gridDim.x) * stages * kCopyChunkBytes, phase ^= 1) {
    bulk_wait_read<0>();
    mbarrier_arrive_expect(&full[stage], kCopyChunkBytes);
    bulk_load(buffer, from + at, kCopyChunkBytes, &full[stage]);
    mbarrier_wait(&full[stage], phase);
    bulk_store(to + at, buffer, kCopyChunkBytes);
    bulk_commit();
  }
  bulk_wait<0>();
}

// Stores as CombineWarp makes them: each warp pushes a block by 16-byte accesses, 2 KB at a time,
// then signals the block's flag, which lies where `to` does. `bytes` is a multiple of
// `block_bytes`, and `block_bytes` of 2 KB.
extern "C" __global__ void push(char* to, const char* from, u64 bytes, u64 block_bytes, u64* flags,
                                u64 epoch) {
  const int warps = gridDim.x * blockDim.x / 32, lane = threadIdx.x % 32;
  const int first = (blockIdx.x * blockDim.x + threadIdx.x) / 32;
  for (u64 block = first; block < bytes / block_bytes; block += warps) {
    const uint4* source = reinterpret_cast<const uint4*>(from + block * block_bytes) + lane;
    uint4* target = reinterpret_cast<uint4*>(to + block * block_bytes) + lane;
    for (u64 at = 0; at < block_bytes / 16; at += 128) {
      uint4 values[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) values[i] = source[at + 32 * i];
#pragma unroll
      for (int i = 0; i < 4; ++i) target[at + 32 * i] = values[i];
    }
    __syncwarp();
    if (lane == 0) {
      fence_acq_rel_sys();
      store_release_sys(&flags[block], epoch);
    }
  }
}

// One warp on each of two ranks: a flag there and one back, `rounds` times, after `data_rows` rows
// of 512 bytes each. took_ns: of all rounds; 0 where a flag did not come.
extern "C" __global__ void hop(u64* mine, u64* theirs, uint4* their_data, int rounds, int data_rows,
                               int begins, u64* took_ns) {
  const u64 begin = global_timer_ns();
  const auto send = [&](u64 round) {
    for (int i = 0; i < data_rows; ++i) {
      their_data[32 * i + threadIdx.x] = make_uint4(static_cast<u32>(round), 0, 0, 0);
    }
    __syncwarp();
    if (threadIdx.x == 0) {
      fence_acq_rel_sys();
      store_release_sys(theirs, round);
    }
  };
  for (u64 round = 1; round <= static_cast<u64>(rounds); ++round) {
    if (begins) send(round);
    if (!wait_flag(mine, round)) {
      if (threadIdx.x == 0) *took_ns = 0;
      return;
    }
    if (!begins) send(round);
  }
  if (threadIdx.x == 0) *took_ns = global_timer_ns() - begin;
}

// One thread, one load after the other. `from` is zeros: each load's address waits for the last.
extern "C" __global__ void chase(const u64* from, int rounds, u64* took_ns) {
  const volatile u64* at = from;
  const u64 begin = global_timer_ns();
  for (int i = 0; i < rounds; ++i) at += *at;
  *took_ns = global_timer_ns() - begin + *at;
}

// Likewise by bulk copies.
extern "C" __global__ void fetch(const char* from, int rounds, u32 bytes, u64* took_ns) {
  extern __shared__ __align__(128) char shared[];
  __shared__ u64 full;
  mbarrier_init(&full, 1);
  mbarrier_init_fence();
  const u64 begin = global_timer_ns();
  for (int i = 0; i < rounds; ++i) {
    mbarrier_arrive_expect(&full, bytes);
    bulk_load(shared, from, bytes, &full);
    mbarrier_wait(&full, i & 1);
  }
  *took_ns = global_timer_ns() - begin;
}
