// The turns of a GEMM from the plan: cometrt/plan/turns.py, bit for bit, without a host
// synchronisation. Each block finds where all runs begin and writes its share of the columns.
#pragma once

#include "common/scan.cuh"
#include "gemm/tile.cuh"
#include "schedule/parts.cuh"

namespace cometrt {

// Mirrored by turns_params in cometrt/kernels/params.py.
struct TurnsParams {
  const int *tile_order, *num_tiles, *tile_expert, *expert_offsets, *expert_rows;
  const u32* ok;  // 0: the plan is wrong, there is nothing to do; null: it is right
  WorkItem* items;
  int *num_turns, *progress;
  int num_columns, max_run, backwards, chunk;  // chunk: column tiles walked at a time
  // Parts of the order, a list of turns each: room for part_turns in `items`, counts 3 words on.
  int num_parts, part_turns;
};

// Positions of a part of the plan's order, which begins at `first`.
struct Order {
  const TurnsParams& p;
  int first, num_tiles;

  __device__ int tile(int position) const {
    return p.tile_order[first + (p.backwards ? num_tiles - 1 - position : position)];
  }
  __device__ int expert(int position) const { return p.tile_expert[tile(position)]; }
  __device__ int rows(int position) const {
    const int t = tile(position), e = p.tile_expert[t];
    return min(BLOCK_M, p.expert_offsets[e] + p.expert_rows[e] - t * BLOCK_M);
  }
  // Tiles with rows for both warpgroups go in pairs.
  __device__ bool is_large(int position) const { return rows(position) > kHalfM; }
};

// The tiles around a position that are computed together, column tile by column tile.
struct Run {
  int first, size, num_pairs, num_singles;

  __device__ Run(const Order& order, int position) {
    const int expert = order.expert(position);
    int begin = position, end = position + 1;  // of the stretch of this expert
    while (begin > 0 && order.expert(begin - 1) == expert) --begin;
    while (end < order.num_tiles && order.expert(end) == expert) ++end;
    const int pieces = (end - begin + order.p.max_run - 1) / order.p.max_run;
    const int length = (end - begin + 2 * pieces - 1) / (2 * pieces) * 2;
    first = begin + (position - begin) / length * length;
    size = min(length, end - first);
    int num_large = 0;
    for (int i = first; i < first + size; ++i) num_large += order.is_large(i);
    num_pairs = num_large / 2;
    num_singles = size - 2 * num_pairs;
  }
  // A single takes two column tiles a turn.
  __device__ int num_turns(int columns) const {
    return num_pairs * columns + num_singles * ((columns + 1) / 2);
  }
};

__device__ inline WorkItem item_of(const Order& order, int position, int column, Sharing sharing) {
  const int tile = order.tile(position);
  return {tile, column, order.expert(position), static_cast<u16>(order.rows(position)), sharing};
}

// Column tiles [first, first + columns), two at a time, dealt to blocks.
struct Share {
  int block, blocks, first, columns;
};

// The turns of a run, as far as they are this position's; `base`: the run's first.
__device__ inline void write_run(WorkItem* items, const Order& order, const Run& run, int position,
                                 int base, Share share) {
  int larges = 0, smalls = 0, mate = -1;  // before this one; the last large one
  for (int i = run.first; i < position; ++i) {
    const bool large = order.is_large(i);
    if (large) mate = i;
    larges += large;
    smalls += !large;
  }
  const int pairs = run.num_pairs;
  const bool paired = order.is_large(position) && larges < 2 * pairs;
  if (paired && larges % 2 == 0) return;  // the second of a pair writes both
  const int index = paired ? larges / 2 : smalls + max(0, larges - 2 * pairs);
  for (int j = share.block; j < (share.columns + 1) / 2; j += share.blocks) {
    WorkItem* turns = items + 2ll * (base + j * (2 * pairs + run.num_singles));
    const int column = share.first + 2 * j, count = min(2, share.columns - 2 * j);
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
      const Run run(order, used ? position : first);
      const int turns = run.num_turns(columns);
      const int mine = used && run.first == position ? turns : 0;  // a run counts where it begins
      int total;
      const int end = before + block_scan(mine, shared, &total) + mine;
      const Share share{block, blocks, column, columns};
      if (used) write_run(items, order, run, position, end - turns, share);
      before += total;
    }
  }
  if (block == 0 && threadIdx.x == 0) {
    p.num_turns[3 * part] = before;
    p.progress[3 * part] = p.progress[3 * part + 1] = 0;
  }
}

// By `blocks` blocks of threads, of which this is number `block`; `shared` as for block_scan.
__device__ inline void write_turns(const TurnsParams& p, int block, int blocks, int* shared) {
  const int num_tiles = p.ok == nullptr || *p.ok ? *p.num_tiles : 0;
  for (int part = 0; part < p.num_parts; ++part) {
    const int first = part_begin(num_tiles, part, p.num_parts);
    const int end = part_begin(num_tiles, part + 1, p.num_parts);
    write_part(p, {p, first, end - first}, part, block, blocks, shared);
  }
}

}  // namespace cometrt
