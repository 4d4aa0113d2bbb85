// The turns of a GEMM from the plan: cometrt/plan/turns.py, bit for bit, without a host
// synchronisation. Each block finds where all runs begin and writes its share of the columns.
#pragma once

#include "common/scan.cuh"
#include "gemm/tile.cuh"
#include "schedule/parts.cuh"

namespace cometrt {

// The plan's tables that an order follows from.
struct PlannedTiles {
  const int *tile_order, *num_tiles, *tile_expert, *expert_offsets, *expert_rows;
  const u32* ok;  // 0: the plan is wrong, there is nothing to do; null: it is right
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

// The turns of the pair that ends at this position, if one does, or of its single tile, for column
// tiles [first, first + columns), of which the stretch's begin at `turns`.
__device__ inline void write_position(const Order& order, const Stretch& stretch, int position,
                                      int first, int columns, int group, WorkItem* turns) {
  const int pairs = stretch.pairs(), index = stretch.large_before(position);
  const bool is_small = position == stretch.small, paired = !is_small && index < 2 * pairs;
  if (paired && index % 2 == 0) return;
  const int mate = position - 1 == stretch.small ? position - 2 : position - 1;
  const int before = (stretch.small >= 0 && stretch.small < position) + max(0, index - 2 * pairs);
  for (int done = 0; done < columns; done += group) {
    const int here = min(group, columns - done), end = first + done + here;
    int column = first + done;
    WorkItem* turn = turns + 2 * stretch.turns(done);
    if (paired) {
      turn += 2 * (index / 2) * here;
      for (; column < end; ++column, turn += 2) {
        turn[0] = item_of(order, mate, column, kLoadsAll, kLoadsFirst);
        turn[1] = item_of(order, position, column, kLoadsAll, kLoadsSecond);
      }
    } else {
      turn += 2 * (pairs * here + before * ((here + 1) / 2));
      for (; column < end; column += 2, turn += 2) {
        const bool both = column + 1 < end;
        const u32 second = is_small ? kLoadsNone : kLoadsSecond;
        turn[0] = item_of(order, position, column, both ? kLoadsFirst : kLoadsAll, kLoadsAll);
        turn[1] = both ? item_of(order, position, column + 1, second, kLoadsAll)
                       : WorkItem{-1, 0, 0, 0, 0};
      }
    }
  }
}

__device__ inline void write_part(const TurnsParams& p, const Order& order, int part, int block,
                                  int blocks, int* shared) {
  WorkItem* items = p.items + 2ll * part * p.part_turns;
  int before = 0;
  for (int column = 0; column < p.num_columns; column += p.chunk) {
    const int columns = min(p.chunk, p.num_columns - column);
    for (int first = 0; first < order.num_tiles; first += blockDim.x) {
      const int position = first + threadIdx.x;
      const bool used = position < order.num_tiles;
      const Stretch stretch(order, used ? position : first);
      const int turns = stretch.turns(columns);
      const int mine = used && stretch.begin == position ? turns : 0;
      int total;
      const int base = before + block_scan(mine, shared, &total) + mine - turns;
      if (used && position / 2 % blocks == block) {
        write_position(order, stretch, position, column, columns, p.group, items + 2ll * base);
      }
      before += total;
    }
  }
  if (block == 0 && threadIdx.x == 0) {
    p.num_turns[3 * part] = before;
    p.progress[3 * part] = p.progress[3 * part + 1] = 0;
  }
}

// By `blocks` blocks of threads, of which this is number `block`; `shared` as for block_scan.
__device__ inline void write_turns(const TurnsParams& p, const PlannedTiles& tiles, int block,
                                   int blocks, int* shared) {
  const int num_tiles = tiles.ok == nullptr || *tiles.ok ? *tiles.num_tiles : 0;
  for (int part = 0; part < p.num_parts; ++part) {
    const int first = part_begin(num_tiles, part, p.num_parts);
    const int end = part_begin(num_tiles, part + 1, p.num_parts);
    const Order order{tiles, p.backwards != 0, first, end - first};
    write_part(p, order, part, block, blocks, shared);
  }
}

}  // namespace cometrt
