// The dispatch warps: two of every CTA of dispatch_gemm move rows while the others multiply, from
// their homes, through stages of shared memory, to their places among the experts' rows.
#pragma once

#include "gemm/roles.cuh"
#include "hopper/bulk.cuh"
#include "protocol/emulated_link.cuh"
#include "protocol/exchange_params.cuh"

namespace cometrt {

constexpr int kCopyStages = 3;                        // of a warp: one batch of copy chunks
constexpr u32 kCopyChunkBytes = 4096;                 // of a row; its last chunk may be shorter
constexpr u32 kBytesPerEvent = 64 * kCopyChunkBytes;  // of pulls that a trace shows as one event

struct alignas(128) DispatchStages {
  char bytes[kCommWarps][kCopyStages][kCopyChunkBytes];
  u64 full[kCommWarps][kCopyStages];
};

__device__ inline u32 num_copy_chunks(const Geometry& g) {
  return (2 * g.hidden + kCopyChunkBytes - 1) / kCopyChunkBytes;
}

// One dispatch warp; all its lanes stay together. A transfer item is a copy chunk of a token's row.
// Every token that this rank needs crosses the link once and is written to all its rows, in the
// order in which dispatch_gemm takes the tiles. A warp pops a batch of items from the queue, one
// for each of its copy stages. Ten lanes serve an item; each stands for one of the token's rows.
//
// Software pipeline over batches: the queue ticket is requested two batches ahead, token ids one
// batch ahead. While batch i loads, the stores of batch i - 1 complete and signal tile_filled.
class DispatchWarp {
  static constexpr int kLanesPerItem = 32 / kCopyStages;

  // This lane's item of a batch. No token: -1.
  struct Item {
    int token, row;  // row: this lane's, or -1
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
    // Tickets of a warp only grow: the first one beyond the queue is the end.
#pragma unroll 1
    for (; first < num_items_; ++step_) {
      const u32 offset = (first + stage_) % copy_chunks * kCopyChunkBytes;
      const u32 bytes = now.token >= 0 ? min(kCopyChunkBytes, 2 * p_.g.hidden - offset) : 0;
      bulk_wait_read<0>();  // this lane's stores have read the stages, and then all lanes' have
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
  // Requests the ticket of a batch, the number of its first item; lane 0 gets the answer.
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
  // `use(row)` for each of the item's rows that this lane serves.
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
    const bool loads = bytes != 0 && k_ == 0, crosses = loads && source != p_.world.rank;
    if (loads) {
      const char* from = p_.data<char>(source, p_.pull_offset) + 2ll * index * p_.g.hidden + offset;
      mbarrier_arrive_expect(&full_[stage_], bytes);
      bulk_load<CacheHint::kEvictFirst>(stages_[stage_], from, bytes, &full_[stage_]);
    }
    const u32 link_bytes = __reduce_add_sync(~0u, crosses ? bytes : 0);
    if (is_elected(0)) transfer_.begin(link_, link_bytes);
    recorder.count(true, link_bytes);
    if (Recorder::kOn) recorder.count(false, __reduce_add_sync(~0u, loads && !crosses ? bytes : 0));
  }

  __device__ void store(const Item& item, u32 offset, u32 bytes) {
    if (bytes != 0) mbarrier_wait(&full_[stage_], step_ & 1);
    for_rows(item, [&](int row) {
      char* to = reinterpret_cast<char*>(p_.rows) + 2ll * row * p_.g.hidden;
      bulk_store<CacheHint::kEvictFirst>(to + offset, stages_[stage_], bytes);
    });
    bulk_commit();
  }

  // Of the batch before: signals tile_filled, a count of copy chunks.
  __device__ void release(const Item& item) {
    if (step_ == 0) return;
    bulk_wait<0>();  // complete, not only read
    recorder.begin_wait();
    if (is_elected(1)) wait_transferred(transfer_.end_ns());
    __syncwarp();
    recorder.end_wait(kWaitLink, -1, -1);
    fence_acq_rel_gpu();  // each lane for its own stores
    for_rows(item, [&](int row) { add_relaxed_gpu(&p_.tile_filled[row / p_.g.block_m], 1); });
    recorder.end_if_moved(kBytesPerEvent);
  }

  // The elected lane of a batch keeps its transfer over the link; two lanes take turns, since two
  // batches are under way.
  __device__ bool is_elected(int batches_ago) const {
    return lane_ == static_cast<int>((step_ - batches_ago) % 2);
  }

  const ExchangeParams& p_;
  EmulatedLink link_;
  u32* queue_head_;
  char (*stages_)[kCopyChunkBytes];
  u64* full_;
  int lane_, stage_, k_, num_items_;  // stage_: this lane's item of a batch; kCopyStages: none
  u32 step_ = 0;                      // batches done
  int ticket_ = 0;                    // lane 0's
  LinkTransfer transfer_;             // of the batch that elected this lane
};

}  // namespace cometrt
