// Two warps of every CTA of layer0 move rows while the others multiply: from their homes, through
// slots of shared memory, to their places in the experts' rows.
#pragma once

#include "comm/pacing.cuh"
#include "exchange/call.cuh"
#include "gemm/tile.cuh"
#include "hopper/bulk.cuh"

namespace cometrt {

constexpr int kSlotsOfWarp = 3;
constexpr u32 kPieceBytes = 4096;                // of a row; the last piece may be shorter
constexpr u32 kBytesOfEvent = 64 * kPieceBytes;  // of pulls that a trace tells as one

struct alignas(128) MoverSlots {
  char bytes[kMoverWarps][kSlotsOfWarp][kPieceBytes];
  u64 full[kMoverWarps][kSlotsOfWarp];
};

__device__ inline u32 num_pieces(const Geometry& g) {
  return (2 * g.hidden + kPieceBytes - 1) / kPieceBytes;
}

// One warp of the movers; all its lanes stay together, so that what takes long (a fence above all)
// is waited for once a unit, and not by each lane in turn. A unit is a piece of a token's row.
// Every needed token crosses once and is written to all its rows, tiles in the order in which
// layer0 takes them. Warps take units one by one, as they come to them, so that none waits for a
// CTA that begins late.
//
// All units in flight go one step further at a time. What a step asks for (a unit's number, its
// token, its rows, its bytes) is needed in a later one. Units that were loaded one after the other
// form a group, which takes one time on the link and is released by one fence.
class Puller {
  // A unit's age in steps, since its number was asked for.
  static constexpr int kNumbered = 1, kLoaded = 2, kStored = kLoaded + kSlotsOfWarp - 1;
  static constexpr int kStoresInFlight = 2, kReleased = kStored + kStoresInFlight;
  static constexpr int kGroup = 4, kOldest = kReleased + kGroup - 1;
  static_assert((kReleased - kLoaded) % kGroup == 0, "what is released was reserved as a group");

 public:
  Recorder recorder;  // lane 0 alone tells

  __device__ Puller(const Call& c, const Pace& pace, char (*slots)[kPieceBytes], u64* full)
      : c_(c), pace_(pace), slots_(slots), full_(full), lane_(threadIdx.x % 32) {
    pace_.free_at_ns = own_pointer(pace.free_at_ns);
    taken_ = own_pointer(c.taken);
#pragma unroll
    for (int age = 0; age <= kOldest; ++age) units_[age] = rows_[age] = -1;
  }

  __device__ void run() {
    const u32 pieces = num_pieces(c_.g);
    num_units_ = c_.pull_offsets[c_.g.max_tiles] * static_cast<int>(pieces);
    recorder.begin();
    // Numbers that a warp takes only grow: behind the first that is no unit's there are no more.
#pragma unroll 1
    for (; units_[kOldest] < num_units_; ++step_) {
#pragma unroll
      for (int age = kOldest; age > kNumbered; --age) {
        units_[age] = units_[age - 1];
        if (age > kLoaded) rows_[age] = rows_[age - 1];
      }
      units_[kNumbered] = __shfl_sync(~0u, number_, 0);
      load(pieces);
      if (ends_group()) {
        if (speaks(0)) crossing_.begin(pace_, link_bytes_);
        link_bytes_ = 0;
      }
      if (is_unit(units_[kNumbered])) token_ = c_.pull_tokens[units_[kNumbered] / pieces];
      if (lane_ == 0 && units_[kNumbered] < num_units_) {
        number_ = static_cast<int>(fetch_add_relaxed_gpu(taken_, 1));
      }
      store(pieces);
      release(pieces);
    }
    recorder.end_part(1);
  }

 private:
  __device__ bool is_unit(int unit) const { return unit >= 0 && unit < num_units_; }
  __device__ const int* rows_of(int token) const {
    return c_.pair_row + static_cast<long long>(token) * c_.g.topk;
  }
  // Of a token's rows, those that are not in rows_: `use(row)` by a lane each.
  template <typename Use>
  __device__ void for_more_rows(int unit, u32 pieces, const Use& use) const {
    if (c_.g.topk <= 32) return;
    const int* rows = rows_of(c_.pull_tokens[unit / pieces]);
#pragma unroll 1
    for (int k = 32 + lane_; k < c_.g.topk; k += 32) {
      if (rows[k] >= 0) use(rows[k]);
    }
  }
  __device__ u32 offset_of(int unit, u32 pieces) const { return unit % pieces * kPieceBytes; }
  __device__ u32 bytes_of(u32 offset) const { return min(kPieceBytes, 2 * c_.g.hidden - offset); }

  __device__ bool ends_group() const { return step_ % kGroup == kGroup - 1; }
  // One lane speaks for a group, another for the next one, that many steps ago: each has its own
  // time on the link, at which nobody looks until the group is released.
  __device__ bool speaks(int steps) const {
    return lane_ == static_cast<int>((step_ - steps) / kGroup % 32);
  }

  __device__ void load(u32 pieces) {
    // Each lane's last stores have left the slot that this unit gets, and then all lanes' have.
    bulk_wait_read<0>();
    __syncwarp();
    rows_[kLoaded] = -1;
    if (!is_unit(units_[kLoaded])) return;
    const u32 offset = offset_of(units_[kLoaded], pieces), bytes = bytes_of(offset);
    const int source = token_ / c_.g.max_tokens, index = token_ % c_.g.max_tokens;
    if (lane_ < c_.g.topk) rows_[kLoaded] = rows_of(token_)[lane_];
    if (lane_ == 0) {
      const char* from = c_.data<char>(source, c_.pull_at) + 2ll * index * c_.g.hidden + offset;
      u64* full = &full_[load_at_.slot];
      mbarrier_arrive_expect(full, bytes);
      bulk_load(slots_[load_at_.slot], from, bytes, full);
    }
    link_bytes_ += source != c_.world.rank ? bytes : 0;
    recorder.count(source != c_.world.rank, bytes);
    load_at_.advance();
  }

  __device__ void store(u32 pieces) {
    const int unit = units_[kStored];
    if (is_unit(unit)) {
      const u32 offset = offset_of(unit, pieces), bytes = bytes_of(offset);
      const char* from = slots_[store_at_.slot];
      const auto store_to = [&](int row) {
        char* to = reinterpret_cast<char*>(c_.rows) + 2ll * row * c_.g.hidden;
        bulk_store<Keep::kBriefly>(to + offset, from, bytes);
      };
      mbarrier_wait(&full_[store_at_.slot], store_at_.phase);
      __syncwarp();
      if (rows_[kStored] >= 0) store_to(rows_[kStored]);
      for_more_rows(unit, pieces, store_to);
      store_at_.advance();
    }
    bulk_commit();  // a group a step, be it empty, so that all lanes count the same
  }

  // Of the group that is old enough. Releases tile_filled, a count of pieces.
  __device__ void release(u32 pieces) {
    if (!ends_group() || units_[kReleased] < 0 || units_[kOldest] >= num_units_) return;
    bulk_wait<kStoresInFlight>();  // complete, not only read
    recorder.begin_wait();
    if (speaks(kReleased - kLoaded) && crossing_.needs_ns != 0) wait_crossed(crossing_.end_ns());
    __syncwarp();
    recorder.end_wait(kWaitLink, -1, -1);
    fence_acq_rel_gpu();  // each lane for its own stores
    const auto count = [&](int row) { add_relaxed_gpu(&c_.tile_filled[row / c_.g.block_m], 1); };
#pragma unroll
    for (int age = kOldest; age >= kReleased; --age) {
      if (!is_unit(units_[age])) continue;
      if (rows_[age] >= 0) count(rows_[age]);
      for_more_rows(units_[age], pieces, count);
    }
    recorder.end_part(kBytesOfEvent);
  }

  const Call& c_;
  Pace pace_;
  u32* taken_;
  char (*slots_)[kPieceBytes];
  u64* full_;
  int lane_, num_units_;
  u32 step_ = 0;
  // By age; below 0: none yet. Of the rows each lane has its own, if the token has as many.
  int units_[kOldest + 1], rows_[kOldest + 1];
  int number_ = -1, token_ = 0;  // lane 0's of the next unit; of the one that is loaded next
  u32 link_bytes_ = 0;           // of the group that is loaded now
  Crossing crossing_;            // of the group that this lane speaks for
  Ring<kSlotsOfWarp> load_at_, store_at_;
};

}  // namespace cometrt
