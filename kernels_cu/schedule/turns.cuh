// The turns of a GEMM from the plan: cometrt/plan/turns.py, bit for bit, without a host
// synchronisation. Each block finds where all stretches begin and writes its share of
// the turns.
#pragma once

#include "common/scan.cuh"
#include "gemm/tile.cuh"
#include "schedule/parts.cuh"

namespace cometrt {

// The plan's tables that an order follows from.
struct PlannedTiles {
  const int *tile_order, *num_tiles, *tile_expert, *expert_offsets, *expert_rows;
};

// Mirrored by turns_params in cometrt/kernels/params.py.
struct TurnsParams {
  WorkItem* items;
  int *num_turns, *progress;
  // chunk: column tiles for which the whole order is walked; group: those, within a chunk, that all
  // tiles of a stretch take before the next ones; even, or no less than chunk.
  int num_columns, backwards, chunk, group;
  // Parts of the order, a list of turns each: room for part_turns in `items`, counts 3 words on.
  int num_parts, part_turns;
};

// Positions of a part of the plan's order, which begins at `first`.
struct Order {
  const PlannedTiles& tiles;
  bool backwards;
  int first, num_tiles;

  __device__ int tile(int position) const {
    return tiles.tile_order[first + (backwards ? num_tiles - 1 - position : position)];
  }
  __device__ int expert(int position) const { return tiles.tile_expert[tile(position)]; }
  __device__ int rows(int position) const {
    const int t = tile(position), e = tiles.tile_expert[t];
    return min(BLOCK_M, tiles.expert_offsets[e] + tiles.expert_rows[e] - t * BLOCK_M);
  }
};

// The stretch of one expert's tiles around a position. Its tiles are neighbours, in order, and
// all of more than 64 rows but for the expert's last.
struct Stretch {
  int begin, size, small;  // small: the position of a tile of no more rows, or -1

  Stretch() = default;
  __device__ Stretch(const Order& order, int position) {
    const int tile = order.tile(position), expert = order.expert(position);
    const int first = order.tiles.expert_offsets[expert] / BLOCK_M;
    const int last = first + (order.tiles.expert_rows[expert] - 1) / BLOCK_M;
    // How far the stretch goes on from here, by halving.
    const auto extent = [&](int direction) {
      const int step = order.backwards ? -direction : direction;
      int low = 0, high = step > 0 ? last - tile : tile - first;
      high = min(high, direction > 0 ? order.num_tiles - 1 - position : position);
      while (low < high) {
        const int middle = (low + high + 1) / 2;
        const bool same = order.tile(position + direction * middle) == tile + step * middle;
        low = same ? middle : low;
        high = same ? high : middle - 1;
      }
      return low;
    };
    begin = position - extent(-1);
    size = position + extent(1) + 1 - begin;
    const int end = order.backwards ? begin : begin + size - 1;
    small = order.rows(end) <= kHalfM ? end : -1;
  }
  __device__ int pairs() const { return (size - (small >= 0)) / 2; }
  __device__ int singles() const { return size - 2 * pairs(); }
  // Large tiles before a position.
  __device__ int large_before(int position) const {
    return position - begin - (small >= 0 && small < position);
  }
  // A single takes two column tiles a turn.
  __device__ int turns(int columns) const {
    return pairs() * columns + singles() * ((columns + 1) / 2);
  }
};

__device__ inline WorkItem item_of(const Order& order, int position, int column, u32 a, u32 b) {
  const int tile = order.tile(position);
  return {tile, column, order.expert(position), static_cast<u16>(order.rows(position)),
          static_cast<u16>(a | b << 2)};
}

// Where a position's stretch begins in the list of turns.
struct Placed {
  Stretch stretch;
  int turns;
};

// The turn of a position and a column, one of [first, first + columns), if one is theirs: the
// second of a pair of tiles has one with each column, a single tile with every other.
__device__ inline void write_turn(const Order& order, const Placed& placed, int position, int first,
                                  int columns, int group, int column, WorkItem* items) {
  const Stretch& stretch = placed.stretch;
  const int pairs = stretch.pairs(), index = stretch.large_before(position);
  const int done = column / group * group, here = min(group, columns - done), in = column - done;
  const bool is_small = position == stretch.small, paired = !is_small && index < 2 * pairs;
  if (paired ? index % 2 == 0 : in % 2 != 0) return;
  const int single = (stretch.small >= 0 && stretch.small < position) + max(0, index - 2 * pairs);
  int turn = placed.turns + stretch.turns(done);
  turn += paired ? index / 2 * here + in : pairs * here + single * ((here + 1) / 2) + in / 2;
  const bool both = paired || in + 1 < here;
  const int mate = position - 1 == stretch.small ? position - 2 : position - 1;
  const u32 one = both ? kLoadsFirst : kLoadsAll, other = is_small ? kLoadsNone : kLoadsSecond;
  WorkItem* out = items + 2ll * turn;
  out[0] = item_of(order, paired ? mate : position, first + column, paired ? kLoadsAll : one,
                   paired ? kLoadsFirst : kLoadsAll);
  out[1] = both ? item_of(order, position, first + column + !paired, paired ? kLoadsAll : other,
                          paired ? kLoadsSecond : kLoadsAll)
                : WorkItem{-1, 0, 0, 0, 0};
}

// Blocks of kThreads threads.
template <int kThreads>
__device__ inline void write_part(const TurnsParams& p, const Order& order, int part, int block,
                                  int blocks, int* shared) {
  __shared__ Placed placed[kThreads];  // of as many positions
  WorkItem* items = p.items + 2ll * part * p.part_turns;
  int before = 0;
  for (int column = 0; column < p.num_columns; column += p.chunk) {
    const int columns = min(p.chunk, p.num_columns - column);
    for (int first = 0; first < order.num_tiles; first += kThreads) {
      const int position = first + threadIdx.x;
      const bool used = position < order.num_tiles;
      const Stretch stretch(order, used ? position : first);
      const int turns = stretch.turns(columns);
      const int mine = used && stretch.begin == position ? turns : 0;
      int total;
      const int base = before + block_scan(mine, shared, &total) + mine - turns;
      placed[threadIdx.x] = {stretch, base};
      __syncthreads();
      const int count = min(kThreads, order.num_tiles - first) * columns;
      for (int i = block * kThreads + threadIdx.x; i < count; i += blocks * kThreads) {
        write_turn(order, placed[i / columns], first + i / columns, column, columns, p.group,
                   i % columns, items);
      }
      __syncthreads();
      before += total;
    }
  }
  if (block == 0 && threadIdx.x == 0) {
    p.num_turns[3 * part] = before;
    p.progress[3 * part] = p.progress[3 * part + 1] = 0;
  }
}

// By `blocks` blocks of kThreads threads, of which this is number `block`; `shared` as for
// block_scan.
template <int kThreads>
__device__ inline void write_turns(const TurnsParams& p, const PlannedTiles& tiles, int block,
                                   int blocks, int* shared) {
  const int num_tiles = *tiles.num_tiles;
  for (int part = 0; part < p.num_parts; ++part) {
    const int first = part_begin(num_tiles, part, p.num_parts);
    const int end = part_begin(num_tiles, part + 1, p.num_parts);
    const Order order{tiles, p.backwards != 0, first, end - first};
    write_part<kThreads>(p, order, part, block, blocks, shared);
  }
}

}  // namespace cometrt
