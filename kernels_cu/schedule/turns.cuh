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
  // pairs of a stretch take before the next ones, a multiple of cluster / 2.
  int num_columns, cluster, backwards, chunk, group;
  // Parts of the order, a list of turns each: room for part_turns in `items`, counts 3 words on.
  int num_parts, part_turns, unused;
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

// The stretch of one expert's tiles around a position. At most one of them, the expert's last, has
// no more than 64 rows: all others are large.
struct Stretch {
  int begin, size, small;  // small: its position, or -1

  __device__ Stretch(const Order& order, int position) : begin(position), small(-1) {
    const int expert = order.expert(position), rows = order.tiles.expert_rows[expert];
    const int last = (order.tiles.expert_offsets[expert] + rows - 1) / BLOCK_M;
    const bool has_small = (rows - 1) % BLOCK_M < kHalfM;
    int end = position;
    const auto take = [&](int at) {
      if (at < 0 || at >= order.num_tiles) return false;
      const int tile = order.tile(at);
      if (order.tiles.tile_expert[tile] != expert) return false;
      if (has_small && tile == last) small = at;
      return true;
    };
    while (take(end)) ++end;
    while (take(begin - 1)) --begin;
    size = end - begin;
  }
  __device__ int pairs() const { return (size - (small >= 0)) / 2; }
  __device__ int singles() const { return size - 2 * pairs(); }
  // Large tiles before a position.
  __device__ int large_before(int position) const {
    return position - begin - (small >= 0 && small < position);
  }
};

// The turns of a stretch for `columns` column tiles: of its pairs, of the column tile that these
// leave over, of its singles.
struct Counts {
  int of_pairs, of_rest, of_singles;

  __device__ Counts(const Stretch& stretch, int columns, int cluster) {
    const int step = cluster / 2;
    of_pairs = stretch.pairs() * (columns / step);
    of_rest = columns % step ? (stretch.pairs() + 1) / 2 : 0;
    of_singles = stretch.singles() * ((columns + cluster - 1) / cluster);
  }
  __device__ int all() const { return of_pairs + of_rest + of_singles; }
};

// What a CTA loads of an operand: `place` among the CTAs that read it, a bit each in `ctas`.
__device__ inline u32 loads_of(int place, u32 ctas, bool two_halves) {
  const u32 shared = place < 2 ? 1 + place : 0, halves = (ctas & (ctas - 1)) == 0 ? 3 : shared;
  return ctas | (two_halves ? halves : halves & 1) << 4;
}

// A turn is `tiles` M-tiles by `columns` column tiles; writes those of its m-th tile.
__device__ inline void write_tile(const Order& order, int position, int m, int tiles, int first,
                                  int columns, WorkItem* turn) {
  const int tile = order.tile(position), rows = order.rows(position);
  const u32 row_ctas = (1u << columns) - 1;
  u32 column_ctas = 0;
  for (int i = 0; i < tiles; ++i) column_ctas |= 1u << i * columns;
  for (int n = 0; n < columns; ++n) {
    const u32 a = loads_of(n, row_ctas << m * columns, rows > kHalfM);
    const u32 b = loads_of(m, column_ctas << n, true);
    turn[m * columns + n] = {tile, first + n, order.expert(position), static_cast<u16>(rows),
                             static_cast<u16>(a | b << 6)};
  }
}

__device__ inline void write_idle(WorkItem* turn, int begin, int end) {
  for (int i = begin; i < end; ++i) turn[i] = {-1, 0, 0, 0, 0};
}

// The turns of the pair that ends at this position, if one does, or of its single tile, for column
// tiles [first, first + columns), of which the stretch's begin at `turns`.
__device__ inline void write_position(const TurnsParams& p, const Order& order,
                                      const Stretch& stretch, int position, int first, int columns,
                                      WorkItem* turns) {
  const int cluster = p.cluster, step = cluster / 2, pairs = stretch.pairs();
  const int index = stretch.large_before(position), whole = columns / step * step;
  const Counts counts(stretch, columns, cluster);
  const bool is_small = position == stretch.small;
  if (!is_small && index < 2 * pairs) {
    if (index % 2 == 0) return;
    const int pair = index / 2, mate = position - 1 == stretch.small ? position - 2 : position - 1;
    for (int done = 0; done < whole; done += p.group) {
      const int here = min(p.group, whole - done);
      WorkItem* turn = turns + (pairs * (done / step) + pair * (here / step)) * cluster;
      for (int column = first + done; column < first + done + here; column += step) {
        write_tile(order, mate, 0, 2, column, step, turn);
        write_tile(order, position, 1, 2, column, step, turn);
        turn += cluster;
      }
    }
    if (whole < columns) {
      WorkItem* turn = turns + (counts.of_pairs + pair / 2) * cluster;
      const int m = pair % 2 * 2, tiles = pair % 2 == 0 && pair == pairs - 1 ? 2 : 4;
      write_tile(order, mate, m, tiles, first + whole, 1, turn);
      write_tile(order, position, m + 1, tiles, first + whole, 1, turn);
      if (tiles == 2) write_idle(turn, 2, cluster);
    }
    return;
  }
  const int before = (stretch.small >= 0 && stretch.small < position) + max(0, index - 2 * pairs);
  const int each = counts.of_singles / stretch.singles();
  WorkItem* turn = turns + (counts.of_pairs + counts.of_rest + before * each) * cluster;
  for (int done = 0; done < columns; done += cluster, turn += cluster) {
    const int here = min(cluster, columns - done);
    write_tile(order, position, 0, 1, first + done, here, turn);
    write_idle(turn, here, cluster);
  }
}

__device__ inline void write_part(const TurnsParams& p, const Order& order, int part, int block,
                                  int blocks, int* shared) {
  WorkItem* items = p.items + static_cast<long long>(p.cluster) * part * p.part_turns;
  int before = 0;
  for (int column = 0; column < p.num_columns; column += p.chunk) {
    const int columns = min(p.chunk, p.num_columns - column);
    for (int first = 0; first < order.num_tiles; first += blockDim.x) {
      const int position = first + threadIdx.x;
      const bool used = position < order.num_tiles;
      const Stretch stretch(order, used ? position : first);
      const int turns = Counts(stretch, columns, p.cluster).all();
      const int mine = used && stretch.begin == position ? turns : 0;
      int total;
      const int base = before + block_scan(mine, shared, &total) + mine - turns;
      if (used && position / 2 % blocks == block) {
        write_position(p, order, stretch, position, column, columns,
                       items + static_cast<long long>(p.cluster) * base);
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
