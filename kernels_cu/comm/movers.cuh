// Two warps of every CTA of layer0 move rows while the others multiply: from their homes, through
// slots of shared memory, to their places in the experts' rows.
#pragma once

#include "comm/pacing.cuh"
#include "exchange/call.cuh"
#include "gemm/tile.cuh"
#include "hopper/bulk.cuh"

namespace cometrt {

constexpr int kSlotsOfWarp = 3;                  // a batch
constexpr u32 kPieceBytes = 4096;                // of a row; the last piece may be shorter
constexpr u32 kBytesOfEvent = 64 * kPieceBytes;  // of pulls that a trace tells as one

struct alignas(128) MoverSlots {
  char bytes[kMoverWarps][kSlotsOfWarp][kPieceBytes];
  u64 full[kMoverWarps][kSlotsOfWarp];
};

__device__ inline u32 num_pieces(const Geometry& g) {
  return (2 * g.hidden + kPieceBytes - 1) / kPieceBytes;
}

// One warp of the movers; all its lanes stay together. A unit is a piece of a token's row. Every
// needed token crosses once and is written to all its rows, tiles in the order in which layer0
// takes them. Warps take a batch of units, a slot each, as they come to it, so that none waits for
// a CTA that begins late. A lane stands for one of a unit's rows.
//
// What takes long is asked for well before it is needed: a batch's number two batches ahead, its
// tokens one ahead; and while a batch's bytes come, the one before, which is on its way to its
// rows, is waited for and released.
class Puller {
  static constexpr int kLanesOfUnit = 32 / kSlotsOfWarp;

  // This lane's unit of a batch. No token: -1.
  struct Unit {
    int token, row;  // row: this lane's, or -1
  };

 public:
  Recorder recorder;  // lane 0 alone tells

  __device__ Puller(const Call& c, const Pace& pace, char (*slots)[kPieceBytes], u64* full)
      : c_(c),
        pace_(pace),
        slots_(slots),
        full_(full),
        lane_(threadIdx.x % 32),
        slot_(lane_ / kLanesOfUnit),
        k_(lane_ % kLanesOfUnit) {
    pace_.free_at_ns = own_pointer(pace.free_at_ns);
    taken_ = own_pointer(c.taken);
  }

  __device__ void run() {
    const u32 pieces = num_pieces(c_.g);
    num_units_ = c_.pull_offsets[c_.g.max_tiles] * static_cast<int>(pieces);
    recorder.begin();
    take();
    int first = __shfl_sync(~0u, number_, 0);
    take();
    Unit now{token_of(first, pieces), -1}, before{-1, -1};
    // Numbers that a warp takes only grow: behind the first that is no unit's there are no more.
#pragma unroll 1
    for (; first < num_units_; ++step_) {
      const u32 offset = (first + slot_) % pieces * kPieceBytes;
      const u32 bytes = now.token >= 0 ? min(kPieceBytes, 2 * c_.g.hidden - offset) : 0;
      bulk_wait_read<0>();  // each lane's stores have left the slots, and then all lanes' have
      __syncwarp();
      load(now.token, offset, bytes);
      if (now.token >= 0 && k_ < c_.g.topk) now.row = rows_of(now.token)[k_];
      first = __shfl_sync(~0u, number_, 0);
      take();
      const Unit next{token_of(first, pieces), -1};
      release(before);
      store(now, offset, bytes);
      before = now;
      now = next;
    }
    release(before);
    recorder.end_part(1);
  }

 private:
  // Asks for the number of a batch's first unit; the answer is lane 0's.
  __device__ void take() {
    if (lane_ == 0) number_ = static_cast<int>(fetch_add_relaxed_gpu(taken_, kSlotsOfWarp));
  }
  __device__ int token_of(int first, u32 pieces) const {
    const int unit = first + slot_;
    return slot_ < kSlotsOfWarp && unit < num_units_ ? c_.pull_tokens[unit / pieces] : -1;
  }
  __device__ const int* rows_of(int token) const {
    return c_.pair_row + static_cast<long long>(token) * c_.g.topk;
  }
  // `use(row)` for those of a unit's rows that are this lane's.
  template <typename Use>
  __device__ void for_rows(const Unit& unit, const Use& use) const {
    if (unit.token < 0) return;
    if (unit.row >= 0) use(unit.row);
#pragma unroll 1
    for (int k = k_ + kLanesOfUnit; k < c_.g.topk; k += kLanesOfUnit) {
      const int row = rows_of(unit.token)[k];
      if (row >= 0) use(row);
    }
  }

  __device__ void load(int token, u32 offset, u32 bytes) {
    const int source = token / c_.g.max_tokens, index = token % c_.g.max_tokens;
    const bool loads = bytes != 0 && k_ == 0, crosses = loads && source != c_.world.rank;
    if (loads) {
      const char* from = c_.data<char>(source, c_.pull_at) + 2ll * index * c_.g.hidden + offset;
      mbarrier_arrive_expect(&full_[slot_], bytes);
      bulk_load<Keep::kBriefly>(slots_[slot_], from, bytes, &full_[slot_]);
    }
    const u32 link_bytes = __reduce_add_sync(~0u, crosses ? bytes : 0);
    if (speaks(0)) crossing_.begin(pace_, link_bytes);
    recorder.count(true, link_bytes);
    if (Recorder::kOn) recorder.count(false, __reduce_add_sync(~0u, loads && !crosses ? bytes : 0));
  }

  __device__ void store(const Unit& unit, u32 offset, u32 bytes) {
    if (bytes != 0) mbarrier_wait(&full_[slot_], step_ & 1);
    for_rows(unit, [&](int row) {
      char* to = reinterpret_cast<char*>(c_.rows) + 2ll * row * c_.g.hidden;
      bulk_store<Keep::kBriefly>(to + offset, slots_[slot_], bytes);
    });
    bulk_commit();
  }

  // Of the batch before. Releases tile_filled, a count of pieces.
  __device__ void release(const Unit& unit) {
    if (step_ == 0) return;
    bulk_wait<0>();  // complete, not only read
    recorder.begin_wait();
    if (speaks(1) && crossing_.needs_ns != 0) wait_crossed(crossing_.end_ns());
    __syncwarp();
    recorder.end_wait(kWaitLink, -1, -1);
    fence_acq_rel_gpu();  // each lane for its own stores
    for_rows(unit, [&](int row) { add_relaxed_gpu(&c_.tile_filled[row / c_.g.block_m], 1); });
    recorder.end_part(kBytesOfEvent);
  }

  // One lane speaks for a batch, another for the next one: each has its own time on the link, at
  // which nobody looks until the batch is released.
  __device__ bool speaks(int batches_ago) const {
    return lane_ == static_cast<int>((step_ - batches_ago) % 2);
  }

  const Call& c_;
  Pace pace_;
  u32* taken_;
  char (*slots_)[kPieceBytes];
  u64* full_;
  int lane_, slot_, k_, num_units_;  // slot_: this lane's unit of a batch; kSlotsOfWarp: none
  u32 step_ = 0;                     // batches
  int number_ = 0;                   // lane 0's
  Crossing crossing_;                // of the batch that this lane speaks for
};

}  // namespace cometrt
