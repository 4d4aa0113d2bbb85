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
  // chunk: column tiles for which the whole order is walked; group: those, within a chunk, for
  // which a stretch of one expert's tiles is walked.
  int num_columns, max_run, backwards, chunk, group;
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
  // Tiles with rows for both warpgroups go in pairs.
  __device__ bool is_large(int position) const { return rows(position) > kHalfM; }
};

// Turns of tiles that take column tiles together: some in pairs, the others alone and then two
// column tiles a turn.
__device__ inline int turns_of(int tiles, int pairs, int columns) {
  return pairs * columns + (tiles - 2 * pairs) * ((columns + 1) / 2);
}

// The stretch of one expert's tiles around a position, and the run in it that is computed together.
struct Run {
  int begin, first, size, size_all;    // the stretch, the run, their tiles
  int pairs, pairs_before, pairs_all;  // of the run, of the runs before it, of the stretch

  __device__ Run(const Order& order, int position, int max_run) : begin(position) {
    const int expert = order.expert(position);
    int end = position + 1;
    while (begin > 0 && order.expert(begin - 1) == expert) --begin;
    while (end < order.num_tiles && order.expert(end) == expert) ++end;
    const int pieces = (end - begin + max_run - 1) / max_run;
    const int length = (end - begin + 2 * pieces - 1) / (2 * pieces) * 2;
    first = begin + (position - begin) / length * length;
    size = min(length, end - first);
    size_all = end - begin;
    pairs = pairs_before = pairs_all = 0;
    for (int start = begin; start < end; start += length) {
      int num_large = 0;
      for (int i = start; i < min(start + length, end); ++i) num_large += order.is_large(i);
      if (start == first) pairs_before = pairs_all, pairs = num_large / 2;
      pairs_all += num_large / 2;
    }
  }
  // Of the stretch, of the runs before this one, for so many column tiles.
  __device__ int all_turns(int columns) const { return turns_of(size_all, pairs_all, columns); }
  __device__ int turns_before(int columns) const {
    return turns_of(first - begin, pairs_before, columns);
  }
};

__device__ inline WorkItem item_of(const Order& order, int position, int column, Sharing sharing) {
  const int tile = order.tile(position);
  return {tile, column, order.expert(position), static_cast<u16>(order.rows(position)), sharing};
}

// The turns of a run for column tiles [first, first + columns), as far as they are this
// position's, from `turns` on.
__device__ inline void write_run(const Order& order, const Run& run, int position, int first,
                                 int columns, WorkItem* turns) {
  int larges = 0, smalls = 0, mate = -1;  // before this one; the last large one
  for (int i = run.first; i < position; ++i) {
    const bool large = order.is_large(i);
    if (large) mate = i;
    larges += large;
    smalls += !large;
  }
  const int pairs = run.pairs;
  const bool paired = order.is_large(position) && larges < 2 * pairs;
  if (paired && larges % 2 == 0) return;  // the second of a pair writes both
  const int index = paired ? larges / 2 : smalls + max(0, larges - 2 * pairs);
  for (int column = first; column < first + columns; column += 2, turns += 2 * run.size) {
    const int count = min(2, first + columns - column);
    if (paired) {
      for (int c = 0; c < count; ++c) {
        turns[2 * (c * pairs + index)] = item_of(order, mate, column + c, kSharesB);
        turns[2 * (c * pairs + index) + 1] = item_of(order, position, column + c, kSharesB);
      }
    } else {
      WorkItem* turn = turns + 2 * (count * pairs + index);
      const WorkItem nothing{-1, 0, 0, 0, kSharesNothing};
      turn[0] = item_of(order, position, column, count == 2 ? kSharesA : kSharesNothing);
      turn[1] = count == 2 ? item_of(order, position, column + 1, kSharesA) : nothing;
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
      const Run run(order, used ? position : first, p.max_run);
      const int whole = columns / p.group, rest = columns % p.group;  // groups, columns of the last
      const int turns = whole * run.all_turns(p.group) + run.all_turns(rest);
      const int mine = used && run.begin == position ? turns : 0;  // counts where a stretch begins
      int total;
      int base = before + block_scan(mine, shared, &total) + mine - turns;
      const bool dealt = used && run.first / 2 % blocks == block;  // runs are dealt to blocks
      for (int done = 0; dealt && done < columns; done += p.group) {
        const int here = min(p.group, columns - done);
        write_run(order, run, position, column + done, here,
                  items + 2ll * (base + run.turns_before(here)));
        base += run.all_turns(here);
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
