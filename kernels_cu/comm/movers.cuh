// Two warps of every CTA of layer0 move rows while the others multiply: from their homes, through
// slots of shared memory, to their places in the experts' rows.
#pragma once

#include "comm/pacing.cuh"
#include "exchange/call.cuh"
#include "gemm/tile.cuh"
#include "hopper/bulk.cuh"

namespace cometrt {

constexpr int kSlotsOfWarp = 3, kMoverSlots = kMoverWarps * kSlotsOfWarp;
constexpr u32 kPieceBytes = 4096;  // of a row; the last piece may be shorter
constexpr int kPullsInFlight = 3;  // stored or crossing, of each slot
constexpr int kRowsAtOnce = 8;
constexpr u32 kBytesOfEvent = 64 * kPieceBytes;  // of pulls that a trace tells as one

struct alignas(128) MoverSlots {
  char bytes[kMoverSlots][kPieceBytes];
  u64 full[kMoverSlots];
};

__device__ inline u32 num_pieces(const Geometry& g) {
  return (2 * g.hidden + kPieceBytes - 1) / kPieceBytes;
}

// One thread a slot: every needed token crosses once and is written to all its rows, tiles in the
// order in which layer0 takes them. Movers take the next piece when they have done with one, so
// that none waits for a CTA that begins late.
class Puller {
 public:
  Recorder recorder;

  __device__ Puller(const Call& c, const Pace& pace, char* buffer, u64* full)
      : c_(c), pace_(pace), buffer_(buffer), full_(full) {}

  __device__ void run() {
    const u32 row_bytes = 2 * c_.g.hidden, pieces = num_pieces(c_.g);
    const int num_units = c_.pull_offsets[c_.g.max_tiles] * static_cast<int>(pieces);
    const auto take = [&] { return static_cast<int>(atomicAdd(c_.taken, 1)); };
    // The next two are on their way: a unit's number, and its token.
    int unit = take(), ahead = unit < num_units ? take() : num_units;
    int token = unit < num_units ? c_.pull_tokens[unit / pieces] : 0;
    u32 phase = 0;
    recorder.begin();
    for (; unit < num_units; phase ^= 1) {
      const u32 offset = unit % pieces * kPieceBytes, bytes = min(kPieceBytes, row_bytes - offset);
      const u64 crossed_ns = load(token, offset, bytes);
      const int next = ahead < num_units ? c_.pull_tokens[ahead / pieces] : 0;
      const int after = ahead < num_units ? take() : num_units;
      store(token, offset, bytes, phase);
      if (count_ == kPullsInFlight) {
        bulk_wait<kPullsInFlight>();  // complete, not only read: then it may be released
        release(0);
        --count_;
#pragma unroll
        for (int i = 1; i < kPullsInFlight; ++i) {
          tokens_[i - 1] = tokens_[i];
          crossed_ns_[i - 1] = crossed_ns_[i];
        }
      }
#pragma unroll
      for (int i = 0; i < kPullsInFlight; ++i) {
        if (i == count_) tokens_[i] = token, crossed_ns_[i] = crossed_ns;
      }
      ++count_;
      unit = ahead, ahead = after, token = next;
    }
    bulk_wait<0>();
#pragma unroll
    for (int i = 0; i < kPullsInFlight; ++i) {
      if (i < count_) release(i);
    }
    recorder.end_part(1);
  }

 private:
  __device__ const int* rows_of(int token) const {
    return c_.pair_row + static_cast<long long>(token) * c_.g.topk;
  }

  // Returns when it will have crossed.
  __device__ u64 load(int token, u32 offset, u32 bytes) {
    const int source = token / c_.g.max_tokens, index = token % c_.g.max_tokens;
    const u64 crossed_ns = source == c_.world.rank ? 0 : reserve_link(pace_, bytes);
    recorder.count(source != c_.world.rank, bytes);
    const char* from = c_.data<char>(source, c_.pull_at) + 2ll * index * c_.g.hidden + offset;
    bulk_wait_read<0>();  // the slot's last stores have left it
    mbarrier_arrive_expect(full_, bytes);
    bulk_load(buffer_, from, bytes, full_);
    return crossed_ns;
  }

  __device__ void store(int token, u32 offset, u32 bytes, u32 phase) {
    const int* rows = rows_of(token);
    int first[kRowsAtOnce];  // on their way while the row is
#pragma unroll
    for (int k = 0; k < kRowsAtOnce; ++k) first[k] = k < c_.g.topk ? rows[k] : -1;
    mbarrier_wait(full_, phase);
#pragma unroll
    for (int k = 0; k < kRowsAtOnce; ++k) store_to(first[k], offset, bytes);
    for (int k = kRowsAtOnce; k < c_.g.topk; ++k) store_to(rows[k], offset, bytes);
    bulk_commit();
  }
  __device__ void store_to(int row, u32 offset, u32 bytes) {
    if (row < 0) return;
    char* to = reinterpret_cast<char*>(c_.rows) + 2ll * row * c_.g.hidden;
    bulk_store<Keep::kBriefly>(to + offset, buffer_, bytes);
  }

  // Of the i-th pull in flight, whose stores are complete. Releases tile_filled, a count of pieces.
  __device__ void release(int i) {
    const int* rows = rows_of(tokens_[i]);
    recorder.begin_wait();
    if (crossed_ns_[i] != 0) wait_crossed(crossed_ns_[i]);
    recorder.end_wait(kWaitLink, -1, -1);
    fence_acq_rel_gpu();
#pragma unroll 4
    for (int k = 0; k < c_.g.topk; ++k) {
      const int row = rows[k];
      if (row >= 0) add_relaxed_gpu(&c_.tile_filled[row / c_.g.block_m], 1);
    }
    recorder.end_part(kBytesOfEvent);
  }

  const Call& c_;
  const Pace& pace_;
  char* buffer_;
  u64* full_;
  // Oldest first. The link is what they wait for: the slot itself is free for the next row.
  int tokens_[kPullsInFlight], count_ = 0;
  u64 crossed_ns_[kPullsInFlight];
};

}  // namespace cometrt
