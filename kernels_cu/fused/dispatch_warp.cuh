// The dispatch warps of dispatch_gemm and dispatch_down_dgrad: two a CTA. They copy token rows from
// their homes through stages of shared memory to the rows of the experts, and signal tile_filled to
// the load threads.
#pragma once

#include "gemm/roles.cuh"
#include "hopper/bulk.cuh"
#include "protocol/emulated_link.cuh"
#include "protocol/exchange_params.cuh"
#include "protocol/late_parts.cuh"

#ifndef LATE
#define LATE 0
#endif

namespace cometrt {

constexpr u32 kBytesPerEvent = 256 * 1024;  // pulls of one traced event

// How a kernel cuts rows. kStages: copy stages of a warp; a batch fills all of them. kChunkBytes:
// of a copy chunk; the last one of a row may be shorter.
template <int kNumStages, u32 kBytesOfChunk>
struct CopyShape {
  static constexpr int kStages = kNumStages;
  static constexpr u32 kChunkBytes = kBytesOfChunk;

  __device__ static u32 chunks_of_row(const Geometry& g) {
    return (2 * g.hidden + kChunkBytes - 1) / kChunkBytes;
  }
};

// Shared memory of one dispatch warp. full: completed by the bytes of a bulk load, waited for by
// the lanes of that item.
template <typename Shape>
struct alignas(128) DispatchStages {
  char bytes[Shape::kStages][Shape::kChunkBytes];
  u64 full[Shape::kStages];

  // By one thread. mbarrier_init_fence must follow.
  __device__ void init() {
    for (u64& barrier : full) mbarrier_init(&barrier, 1);
  }
};

// One dispatch warp. A transfer work item is a copy chunk of a token's row. Items are queued in the
// order in which tiles need the tokens. A token crosses the link once and is stored to all its rows
// here. The warp pops a batch of kStages items. kLanesPerItem lanes serve an item: lane k stores to
// the token's row k (and k + kLanesPerItem, ...). All lanes run converged.
//
// kPullsX: the same tokens of x are queued behind those of dy, unless x_rows is null. No tile waits
// for them. They are in place when the launch ends.
//
// LATE: items of a late part wait until it has arrived at all ranks of the node. Those in front of
// it are signalled before. Those of x need not wait: `publish` has brought it.
//
// Software pipeline over batches: the queue ticket is requested two batches ahead, token ids one
// batch ahead. While batch i loads, the stores of batch i - 1 complete and signal tile_filled.
template <typename Shape, bool kPullsX = false>
class DispatchWarp {
  static constexpr int kStages = Shape::kStages, kLanesPerItem = 32 / kStages;
  static constexpr u32 kChunkBytes = Shape::kChunkBytes;

  // This lane's item of a batch.
  struct Item {
    int token, row;  // row: the one that this lane stores to. -1: none
  };

 public:
  Recorder recorder;  // lane 0 alone records

  __device__ DispatchWarp(const ExchangeParams& p, const EmulatedLink& link,
                          DispatchStages<Shape>& stages)
      : p_(p), link_(opaque_link(link)), s_(stages), lane_(threadIdx.x % 32) {
    queue_head_ = opaque_pointer(p.queue_heads);
    if (LATE) limit_ = first_of_part(0);
  }

  __device__ void run() {
    const u32 copy_chunks = Shape::chunks_of_row(p_.g);
    num_items_ = p_.pull_offsets[p_.g.max_tiles] * static_cast<int>(copy_chunks);
    recorder.begin();
    pop_ahead();
    int first = __shfl_sync(~0u, ticket_, 0);
    pop_ahead();
    Item now{token_of(first, copy_chunks), -1}, before{-1, -1};
    // A warp's tickets only grow, so the first one beyond the queue ends its work.
#pragma unroll 1
    for (; first < end(); ++step_) {
      if (LATE && first < num_items_ && min(first + kStages, num_items_) > limit_) {
        release(before);
        before.token = -1;
        wait_late(min(first + kStages, num_items_));
      }
      const u32 offset = (first + stage()) % copy_chunks * kChunkBytes;
      const bool is_x = kPullsX && first + stage() >= num_items_;
      const u32 bytes = now.token >= 0 ? min(kChunkBytes, 2 * p_.g.hidden - offset) : 0;
      bulk_wait_read<0>();  // with __syncwarp: all lanes' stores have read the stages
      __syncwarp();
      load(now.token, is_x ? p_.x_offset : p_.pull_offset, offset, bytes);
      if (now.token >= 0 && k() < p_.g.topk) now.row = rows_of(now.token)[k()];
      first = __shfl_sync(~0u, ticket_, 0);
      pop_ahead();
      const Item next{token_of(first, copy_chunks), -1};
      release(before);
      store(now, is_x ? p_.x_rows : p_.rows, offset, bytes);
      before = now;
      if (is_x) before.token = -1;  // its rows are not signalled
      now = next;
    }
    release(before);
    recorder.end_if_moved(1);
  }

 private:
  // A traced build has no register for the lane and reads the thread index at each use.
  __device__ int lane() const { return TRACE ? thread_index() % 32 : lane_; }
  __device__ int stage() const { return lane() / kLanesPerItem; }  // of its item; kStages: none
  __device__ int k() const { return lane() % kLanesPerItem; }
  // Number of items in the queue: those that fill tiles, then those of x.
  __device__ int end() const {
    return kPullsX && p_.x_rows != nullptr ? 2 * num_items_ : num_items_;
  }

  // The first item of a late part. M-tiles are in the order of plan experts, which is that of sets.
  __device__ int first_of_part(int part) const {
    const int sets = static_cast<int>(p_.num_parts) + 1;
    if (part + 1 >= sets) return 0x7fffffff;
    const int expert = p_.g.local_experts / sets * (part + 1);
    const int tokens = p_.pull_offsets[p_.expert_offsets[expert] / p_.g.block_m];
    return tokens * static_cast<int>(Shape::chunks_of_row(p_.g));
  }
  // Waits for the parts that have items before `end_item`. In a stopped world it waits no more.
  __device__ void wait_late(int end_item) {
    int parts = 0;
    while (end_item > first_of_part(parts)) ++parts;
    const bool ok = wait_parts(p_.world, parts);
    limit_ = ok ? first_of_part(parts) : 0x7fffffff;
  }

  // Lane 0 requests a batch: the ticket is its first item. The result is not waited for here.
  __device__ void pop_ahead() {
    if (lane() == 0) ticket_ = static_cast<int>(fetch_add_relaxed_gpu(queue_head_, kStages));
  }
  __device__ int token_of(int first, u32 copy_chunks) const {
    int item = first + stage();
    if (stage() >= kStages || item >= end()) return -1;
    if (kPullsX && item >= num_items_) item -= num_items_;
    return p_.pull_tokens[item / copy_chunks];
  }
  __device__ const int* rows_of(int token) const {
    return p_.pair_row + static_cast<long long>(token) * p_.g.topk;
  }
  // Calls use(row) for each row of the item that this lane stores to.
  template <typename Use>
  __device__ void for_rows(const Item& item, const Use& use) const {
    if (item.token < 0) return;
    if (item.row >= 0) use(item.row);
#pragma unroll 1
    for (int i = k() + kLanesPerItem; i < p_.g.topk; i += kLanesPerItem) {
      const int row = rows_of(item.token)[i];
      if (row >= 0) use(row);
    }
  }

  // array: byte offset of x or dy in the homes' memory.
  __device__ void load(int token, u64 array, u32 offset, u32 bytes) {
    const int source = token / p_.g.max_tokens, index = token % p_.g.max_tokens;
    const bool loads = bytes != 0 && k() == 0, over_link = loads && source != p_.world.rank;
    if (loads) {
      const char* from = p_.data<char>(source, array) + 2ll * index * p_.g.hidden + offset;
      mbarrier_arrive_expect(&s_.full[stage()], bytes);
      bulk_load<CacheHint::kEvictFirst>(s_.bytes[stage()], from, bytes, &s_.full[stage()]);
    }
    const u32 link_bytes = __reduce_add_sync(~0u, over_link ? bytes : 0);
    if (is_elected(0)) transfer_.begin(link_, link_bytes);
    recorder.count(true, link_bytes);
    if (Recorder::kOn)
      recorder.count(false, __reduce_add_sync(~0u, loads && !over_link ? bytes : 0));
  }

  __device__ void store(const Item& item, __nv_bfloat16* rows, u32 offset, u32 bytes) {
    if (bytes != 0) mbarrier_wait(&s_.full[stage()], step_ & 1);
    for_rows(item, [&](int row) {
      char* to = reinterpret_cast<char*>(rows) + 2ll * row * p_.g.hidden;
      bulk_store<CacheHint::kEvictFirst>(to + offset, s_.bytes[stage()], bytes);
    });
    bulk_commit();
  }

  // Signals tile_filled, a count of copy chunks, for the previous batch: a release at gpu scope by
  // every lane for its own stores. The partner is RowsReady::wait().
  __device__ void release(const Item& item) {
    if (step_ == 0) return;
    bulk_wait<0>();  // the stores are complete
    recorder.begin_wait();
    if (is_elected(1)) wait_transferred(transfer_.end_ns());
    __syncwarp();
    recorder.end_wait(kWaitLink, -1, -1);
    fence_acq_rel_gpu();
    for_rows(item, [&](int row) { add_relaxed_gpu(&p_.tile_filled[row / p_.g.block_m], 1); });
    recorder.end_if_moved(kBytesPerEvent);
  }

  // Whether this lane holds the link transfer of an earlier batch. Lanes 0 and 1 alternate, since
  // two batches are in flight.
  __device__ bool is_elected(int batches_ago) const {
    return lane() == static_cast<int>((step_ - batches_ago) % 2);
  }

  const ExchangeParams& p_;
  EmulatedLink link_;
  u32* queue_head_;
  DispatchStages<Shape>& s_;
  int lane_;
  int num_items_;          // that fill tiles
  int limit_;              // LATE: the first item that may not have arrived
  u32 step_ = 0;           // batches begun
  int ticket_ = 0;         // in lane 0
  LinkTransfer transfer_;  // of the batch that elected this lane
};

// LATE: sets ExchangeParams::turn_ends, for the combine warps of a later launch. By the dispatch
// warps of all CTAs, a block a lane. A block is of the turn of its first token.
__device__ inline void find_turn_ends(const ExchangeParams& p, int comm_warp) {
  const int block_tokens = *p.block_tokens, num_blocks = *p.num_blocks;
  const int first = 32 * (blockIdx.x * kCommWarps + comm_warp) + threadIdx.x % 32;
  for (int i = first; i < num_blocks; i += 32 * kCommWarps * gridDim.x) {
    const int block = p.push_blocks[i], home = block / p.g.blocks_per_home;
    const int at = p.send_offsets[home] + block % p.g.blocks_per_home * block_tokens;
    const int turn = p.turn_of_row(p.send_tokens[at] - home * p.g.max_tokens);
    for (int t = turn; t < p.num_parts; ++t) atomicMax(&p.turn_ends[t], i + 1u);
  }
}

}  // namespace cometrt
