// The dispatch warps of dispatch_gemm: two a CTA. They copy token rows from their homes through
// stages of shared memory to the rows of the experts, and signal tile_filled to the load threads.
#pragma once

#include "gemm/roles.cuh"
#include "hopper/bulk.cuh"
#include "protocol/emulated_link.cuh"
#include "protocol/exchange_params.cuh"

namespace cometrt {

constexpr int kCopyStages = 3;                        // of a warp; a batch fills all of them
constexpr u32 kCopyChunkBytes = 4096;                 // of a row; the last one may be shorter
constexpr u32 kBytesPerEvent = 64 * kCopyChunkBytes;  // pulls of one traced event

// Shared memory of a CTA's dispatch warps. full: completed by the bytes of a bulk load, waited for
// by the lanes of that item.
struct alignas(128) DispatchStages {
  char bytes[kCommWarps][kCopyStages][kCopyChunkBytes];
  u64 full[kCommWarps][kCopyStages];
};

__device__ inline u32 num_copy_chunks(const Geometry& g) {
  return (2 * g.hidden + kCopyChunkBytes - 1) / kCopyChunkBytes;
}

// One dispatch warp. A transfer item is a copy chunk of a token's row. Items are queued in the
// order in which tiles need the tokens. A token crosses the link once and is stored to all its rows
// here. The warp pops a batch of kCopyStages items. Ten lanes serve an item: lane k stores to the
// token's row k (and k + 10, ...). All lanes run converged.
//
// Software pipeline over batches: the queue ticket is requested two batches ahead, token ids one
// batch ahead. While batch i loads, the stores of batch i - 1 complete and signal tile_filled.
class DispatchWarp {
  static constexpr int kLanesPerItem = 32 / kCopyStages;

  // This lane's item of a batch.
  struct Item {
    int token, row;  // row: the one that this lane stores to. -1: none
  };

 public:
  Recorder recorder;  // lane 0 alone records

  __device__ DispatchWarp(const ExchangeParams& p, const EmulatedLink& link,
                          char (*stages)[kCopyChunkBytes], u64* full)
      : p_(p),
        link_(opaque_link(link)),
        stages_(stages),
        full_(full),
        lane_(threadIdx.x % 32),
        stage_(lane_ / kLanesPerItem),
        k_(lane_ % kLanesPerItem) {
    queue_head_ = opaque_pointer(p.queue_heads);
  }

  __device__ void run() {
    const u32 copy_chunks = num_copy_chunks(p_.g);
    num_items_ = p_.pull_offsets[p_.g.max_tiles] * static_cast<int>(copy_chunks);
    recorder.begin();
    pop_ahead();
    int first = __shfl_sync(~0u, ticket_, 0);
    pop_ahead();
    Item now{token_of(first, copy_chunks), -1}, before{-1, -1};
    // A warp's tickets only grow, so the first one beyond the queue ends its work.
#pragma unroll 1
    for (; first < num_items_; ++step_) {
      const u32 offset = (first + stage_) % copy_chunks * kCopyChunkBytes;
      const u32 bytes = now.token >= 0 ? min(kCopyChunkBytes, 2 * p_.g.hidden - offset) : 0;
      bulk_wait_read<0>();  // with __syncwarp: all lanes' stores have read the stages
      __syncwarp();
      load(now.token, offset, bytes);
      if (now.token >= 0 && k_ < p_.g.topk) now.row = rows_of(now.token)[k_];
      first = __shfl_sync(~0u, ticket_, 0);
      pop_ahead();
      const Item next{token_of(first, copy_chunks), -1};
      release(before);
      store(now, offset, bytes);
      before = now;
      now = next;
    }
    release(before);
    recorder.end_if_moved(1);
  }

 private:
  // Lane 0 requests a batch: the ticket is its first item. The result is not waited for here.
  __device__ void pop_ahead() {
    if (lane_ == 0) ticket_ = static_cast<int>(fetch_add_relaxed_gpu(queue_head_, kCopyStages));
  }
  __device__ int token_of(int first, u32 copy_chunks) const {
    const int item = first + stage_;
    return stage_ < kCopyStages && item < num_items_ ? p_.pull_tokens[item / copy_chunks] : -1;
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
    for (int k = k_ + kLanesPerItem; k < p_.g.topk; k += kLanesPerItem) {
      const int row = rows_of(item.token)[k];
      if (row >= 0) use(row);
    }
  }

  __device__ void load(int token, u32 offset, u32 bytes) {
    const int source = token / p_.g.max_tokens, index = token % p_.g.max_tokens;
    const bool loads = bytes != 0 && k_ == 0, over_link = loads && source != p_.world.rank;
    if (loads) {
      const char* from = p_.data<char>(source, p_.pull_offset) + 2ll * index * p_.g.hidden + offset;
      mbarrier_arrive_expect(&full_[stage_], bytes);
      bulk_load<CacheHint::kEvictFirst>(stages_[stage_], from, bytes, &full_[stage_]);
    }
    const u32 link_bytes = __reduce_add_sync(~0u, over_link ? bytes : 0);
    if (is_elected(0)) transfer_.begin(link_, link_bytes);
    recorder.count(true, link_bytes);
    if (Recorder::kOn)
      recorder.count(false, __reduce_add_sync(~0u, loads && !over_link ? bytes : 0));
  }

  __device__ void store(const Item& item, u32 offset, u32 bytes) {
    if (bytes != 0) mbarrier_wait(&full_[stage_], step_ & 1);
    for_rows(item, [&](int row) {
      char* to = reinterpret_cast<char*>(p_.rows) + 2ll * row * p_.g.hidden;
      bulk_store<CacheHint::kEvictFirst>(to + offset, stages_[stage_], bytes);
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

  // Whether this lane holds the link transfer of the batch so many batches ago. Lanes 0 and 1
  // alternate, since two batches are in flight.
  __device__ bool is_elected(int batches_ago) const {
    return lane_ == static_cast<int>((step_ - batches_ago) % 2);
  }

  const ExchangeParams& p_;
  EmulatedLink link_;
  u32* queue_head_;
  char (*stages_)[kCopyChunkBytes];
  u64* full_;
  int lane_, stage_, k_, num_items_;  // stage_: of this lane's item; kCopyStages: no item
  u32 step_ = 0;                      // batches begun
  int ticket_ = 0;                    // in lane 0
  LinkTransfer transfer_;             // of the batch that elected this lane
};

}  // namespace cometrt
