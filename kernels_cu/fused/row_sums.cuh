// Sums of rows, by a warp: it lists what is added for a batch of tokens, rows come through slots of
// shared memory, several ahead of the one that is added, and each token's sum is stored.
#pragma once

#include "exchange/call.cuh"
#include "exchange/sums.cuh"
#include "gemm/tile.cuh"
#include "hopper/bulk.cuh"

namespace cometrt {

constexpr int kSumColumns = 1024;  // of a slot: of one row
// Slots of a group are loaded and read together; while one is added, the others are on their way.
constexpr int kSumGroups = 3, kSlotsOfGroup = 2;
constexpr int kPacks = kSumColumns / 256;   // of eight columns, a lane
constexpr int kPacksAhead = TRACE ? 2 : 3;  // a trace leaves no registers for more
constexpr int kMostTerms = 128;  // of a batch of tokens; a token has topk + ranks at most
constexpr int kTermsOfLane = kMostTerms / 32;
constexpr int kRowsAtOnce = 8;  // of a token: looked up together, where topk is larger

struct TokenEnd {
  int term, token;  // its terms end before `term`
};

// The flag of a block that is stored and crossing, or null.
struct SentBlock {
  u64* flag;
  u64 crossed_ns;
};

// One warp's. What is needed now and then lies here, too: registers are for sums.
struct alignas(128) SumSlots {
  __nv_bfloat16 values[kSumGroups][kSlotsOfGroup][kSumColumns];
  u64 full[kSumGroups];  // each slot's lane arrives
  // The terms of a batch of tokens, token after token: a row of this rank's, or ~slot of staging;
  // what it is multiplied by; where those of each token end that has any, and one for nothing.
  int rows[kMostTerms];
  float weights[kMostTerms];
  TokenEnd ends[32 + 1];
  SentBlock summed, pushed;  // the block at hand, and the one before; lane 0's
  u64 epoch;
  int block, list;  // that this warp has taken, and from which list; list is lane 0's

  // By one thread; then a fence of the barriers.
  __device__ void init() {
    for (u64& barrier : full) mbarrier_init(&barrier, kSlotsOfGroup);
    pushed.flag = nullptr;
  }
};

// What a slot holds: columns of one term's row. Pieces of columns follow each other, and in each
// the terms as they are listed.
struct SumItem {
  int term, column;

  __device__ void advance(int items, int num_terms) {
    for (term += items; term >= num_terms; term -= num_terms) column += kSumColumns;
  }
};

// One warp of those that combine; all its lanes stay together.
class RowSums {
 protected:
  __device__ RowSums(const Call& c, SumSlots& slots) : c_(c), s_(slots), lane_(threadIdx.x % 32) {}

  __device__ int begin(int chunk) const { return chunk * c_.chunk_columns; }
  __device__ int end(int chunk) const { return min(begin(chunk + 1), c_.g.hidden); }

  // Each lane a token, or -1 behind the last: its rows here in the order of k; and with `slots`
  // [ranks], its slots of staging. Returns how many of them there was room for.
  __device__ int list_terms(int token, const int* slots) {
    const int* rows = c_.pair_row + static_cast<long long>(token) * c_.g.topk;
    const int topk = token >= 0 ? c_.g.topk : 0;
    const int ranks = token >= 0 && slots != nullptr ? c_.world.size : 0;
    int first[kRowsAtOnce], count = 0;
#pragma unroll
    for (int k = 0; k < kRowsAtOnce; ++k) first[k] = k < topk ? rows[k] : -1;
#pragma unroll 4
    for (int d = 1; d < ranks; ++d) count += slots[d] >= 0;
#pragma unroll 4
    for (int k = kRowsAtOnce; k < topk; ++k) count += rows[k] >= 0;
#pragma unroll
    for (int k = 0; k < kRowsAtOnce; ++k) count += first[k] >= 0;
    int at = count;
    for (int step = 1; step < 32; step *= 2) {
      const int left = __shfl_up_sync(~0u, at, step);
      if (lane_ >= step) at += left;
    }
    const u32 listed = __ballot_sync(~0u, token >= 0 && at <= kMostTerms);  // the first ones
    const u32 some = __ballot_sync(~0u, count > 0) & listed;
    const int tokens = __popc(listed);
    num_terms_ = __shfl_sync(~0u, at, tokens - 1);
    empty_ = listed & ~some;
    if (lane_ < tokens && count > 0) {
      s_.ends[__popc(some & ((1u << lane_) - 1))] = {at, lane_};
      at -= count;
#pragma unroll
      for (int k = 0; k < kRowsAtOnce; ++k) {
        if (first[k] >= 0) s_.rows[at++] = first[k];
      }
      for (int k = kRowsAtOnce; k < topk; ++k) {
        if (rows[k] >= 0) s_.rows[at++] = rows[k];
      }
      for (int d = 1; d < ranks; ++d) {
        if (slots[d] < 0) continue;
        s_.weights[at] = __int_as_float(d);  // until it has come
        s_.rows[at++] = ~slots[d];
      }
    }
    __syncwarp();
    return tokens;
  }

  // The sums of the listed terms of a batch: the chunk's columns of rows of `to`.
  __device__ void sum_batch(int chunk, __nv_bfloat16* to) {
    const int first = begin(chunk), last = end(chunk);
    store_zeros(to, first, last);
    const int items = (last - first + kSumColumns - 1) / kSumColumns * num_terms_;
    if (items == 0) return;
    SumItem ahead{0, first};  // of this lane's slot of the next group
    ahead.advance(lane_ % kSlotsOfGroup, num_terms_);
#pragma unroll 1
    for (int i = 0; i < kSumGroups; ++i) {
      load((at_.slot + i) % kSumGroups, ahead, items - kSlotsOfGroup * i, last);
    }
    float sum[kPacks][8] = {};
    int term = 0, column = first + 8 * lane_, token = 0;
    TokenEnd end = s_.ends[0];
    const auto end_term = [&] {
      if (++term < end.term) return;
      __nv_bfloat16* row =
          to + (static_cast<u64>(static_cast<u32>(end.token)) * static_cast<u32>(c_.g.hidden) +
                static_cast<u32>(column));
#pragma unroll
      for (int i = 0; i < kPacks; ++i) {
        if (column + 256 * i < last) store_row(row + 256 * i, sum[i]);
#pragma unroll
        for (float& value : sum[i]) value = 0;
      }
      ++token;
      if (term == num_terms_) term = 0, token = 0, column += kSumColumns;
      end = s_.ends[token];
    };
#pragma unroll 1
    for (int left = items; left > 0; left -= kSlotsOfGroup) {
      // What lies behind a row's columns, or in a slot that was not loaded, is added to sums that
      // are not stored.
      uint4 packed[kPacksAhead];  // on their way from the group while those before are added
      const float weights[] = {s_.weights[term], s_.weights[term + 1 < num_terms_ ? term + 1 : 0]};
      mbarrier_wait(&s_.full[at_.slot], at_.phase);
      const uint4* values = reinterpret_cast<const uint4*>(s_.values[at_.slot]) + lane_;
#pragma unroll
      for (int i = 0; i < kPacksAhead; ++i) packed[i] = values[32 * i];
      const auto add = [&](int i) {
        add_packed(sum[i % kPacks], packed[i % kPacksAhead], weights[i / kPacks]);
        const int next = i + kPacksAhead;
        if (next < kSlotsOfGroup * kPacks) packed[i % kPacksAhead] = values[32 * next];
      };
#pragma unroll
      for (int i = 0; i < kPacks; ++i) add(i);
      end_term();
#pragma unroll
      for (int i = kPacks; i < kSlotsOfGroup * kPacks; ++i) {
        if (i + kPacksAhead == kSlotsOfGroup * kPacks) {
          __syncwarp();  // the group has been read
          load(at_.slot, ahead, left - kSumGroups * kSlotsOfGroup, last);
          at_.advance();
        }
        add(i);
      }
      if (left > 1) end_term();
    }
    __syncwarp();  // the list may be written again
  }

  // For tokens without terms.
  __device__ void store_zeros(__nv_bfloat16* to, int first, int last) const {
    const float zeros[8] = {};
    for (u32 left = empty_; left != 0; left &= left - 1) {
      __nv_bfloat16* row = to + static_cast<long long>(__ffs(left) - 1) * c_.g.hidden;
      for (int i = first + 8 * lane_; i < last; i += 256) store_row(row + i, zeros);
    }
  }

  // The next of `left` items, if any: a lane a slot. Lanes without an item arrive without bytes.
  __device__ void load(int group, SumItem& of, int left, int last) {
    if (lane_ >= kSlotsOfGroup || left <= 0) return;
    u64* full = &s_.full[group];
    if (lane_ >= left) {
      mbarrier_arrive(full);
      return;
    }
    const int row = s_.rows[of.term];
    const __nv_bfloat16* from =
        row >= 0 ? c_.partial_rows : c_.data<__nv_bfloat16>(c_.world.rank, c_.staging_at);
    from +=
        static_cast<u64>(static_cast<u32>(row >= 0 ? row : ~row)) * static_cast<u32>(c_.g.hidden) +
        static_cast<u32>(of.column);
    const u32 bytes = 2 * min(kSumColumns, last - of.column);
    mbarrier_arrive_expect(full, bytes);
    bulk_load<Keep::kBriefly>(s_.values[group][lane_], from, bytes, full);
    of.advance(kSlotsOfGroup, num_terms_);
  }

  const Call& c_;
  SumSlots& s_;
  int lane_, num_terms_ = 0;

 private:
  u32 empty_ = 0;        // tokens of the batch that have no terms, a bit each
  Ring<kSumGroups> at_;  // of groups; goes on from batch to batch
};

}  // namespace cometrt
