// The warps of a compute CTA that move rows meanwhile: few registers, a little shared memory, bulk
// copies. They wait for nobody but their own copies in layer0; in layer1 see fused/layer1.cu.
#pragma once

#include "comm/pacing.cuh"
#include "exchange/call.cuh"
#include "hopper/bulk.cuh"

namespace cometrt {

constexpr int kMoverWarps = 2, kSlotsOfWarp = 3, kMoverSlots = kMoverWarps * kSlotsOfWarp;
constexpr u32 kPieceBytes = 4096;  // of a row; the last piece may be shorter

struct MoverSlots {
  char bytes[kMoverSlots][kPieceBytes];
  u64 full[kMoverSlots];
};

__device__ inline u32 num_pieces(const Geometry& g) {
  return (2 * g.hidden + kPieceBytes - 1) / kPieceBytes;
}

// One thread a slot, `mover` of `num_movers` on this rank: every needed token crosses once and is
// written to all its rows, tiles in the order in which layer0 takes them. Releases tile_filled, a
// count of pieces.
__device__ inline void pull_rows(const Call& c, const Pace& pace, char* buffer, u64* full,
                                 int mover, int num_movers) {
  const u32 row_bytes = 2 * c.g.hidden, pieces = num_pieces(c.g);
  const long long num_units =
      static_cast<long long>(c.pull_offsets[c.g.max_tiles]) * static_cast<int>(pieces);
  u32 phase = 0;
  for (long long unit = mover; unit < num_units; unit += num_movers, phase ^= 1) {
    const int token = c.pull_tokens[unit / pieces];
    const u32 offset = static_cast<u32>(unit % pieces) * kPieceBytes;
    const u32 bytes = min(kPieceBytes, row_bytes - offset);
    const int source = token / c.g.max_tokens;
    const u64 crossed_ns = source == c.world.rank ? 0 : reserve_link(pace, bytes);
    const char* from = c.data<char>(source, c.pull_at) +
                       static_cast<long long>(token % c.g.max_tokens) * row_bytes + offset;
    mbarrier_arrive_expect(full, bytes);
    bulk_load(buffer, from, bytes, full);
    mbarrier_wait(full, phase);
    const int* rows = c.pair_row + static_cast<long long>(token) * c.g.topk;
    for (int k = 0; k < c.g.topk; ++k) {
      if (rows[k] < 0) continue;
      char* to = reinterpret_cast<char*>(c.rows) + static_cast<long long>(rows[k]) * row_bytes;
      bulk_store(to + offset, buffer, bytes);
    }
    bulk_commit();
    bulk_wait<0>();  // complete, not only read: then it may be released
    if (crossed_ns != 0) wait_crossed(crossed_ns);
    for (int k = 0; k < c.g.topk; ++k) {
      if (rows[k] >= 0) add_release_gpu(&c.tile_filled[rows[k] / c.g.block_m], 1);
    }
  }
}

}  // namespace cometrt
