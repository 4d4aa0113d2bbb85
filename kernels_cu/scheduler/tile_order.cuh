// Writes the tile order of a GEMM: a list of cluster steps, each with the work tiles of both CTAs.
// It equals that of cometrt/plan/tile_order.py bit for bit. Used by `prepare` and by tile_order.cu.
//
// Order: for each N-chunk, the M-tiles in dispatch order (or backwards). M-tiles of one plan expert
// that follow each other are a tile run. Within a run, all M-tiles take one raster group of N-tiles
// before the next group. Two large M-tiles pair up and share B. A tile without partner takes two
// N-tiles in a step and shares A.
//
// Every team derives where all runs begin, then writes its share of the steps.
#pragma once

#include "common/divisor.cuh"
#include "common/team.cuh"
#include "scheduler/pipeline_chunk.cuh"
#include "scheduler/work_tile.cuh"

namespace cometrt {

// The tables of the plan that determine an order.
struct PlannedTiles {
  const int *tile_order, *num_tiles, *tile_expert, *expert_offsets, *expert_rows;
};

// Mirrored by tile_order_params_dtype in cometrt/kernels/params.py.
struct TileOrderParams {
  WorkTile* work_tiles;
  int *num_steps, *progress;
  // num_n_tiles: of the GEMM. n_chunk: N-tiles of an N-chunk. raster_group: N-tiles of a raster
  // group, even or at least n_chunk. backwards: walk the dispatch order from its end.
  int num_n_tiles, backwards, n_chunk, raster_group;
  // Each pipeline chunk has a list of its own: max_steps steps in work_tiles, and 3 words of
  // counters (num_steps and progress[2]).
  int num_pipeline_chunks, max_steps;
  int num_weights, unused;  // num_weights: plan expert p has the weights of p % num_weights
};

// The M-tiles of a pipeline chunk, which begins at `first` of the dispatch order. Indices count
// from its first tile, or from its last if backwards.
struct Order {
  const PlannedTiles& tiles;
  bool backwards;
  int first, num_tiles, num_weights;

  __device__ int tile(int index) const {
    return tiles.tile_order[first + (backwards ? num_tiles - 1 - index : index)];
  }
};

// The tile run around an order index: tiles of one plan expert with consecutive numbers. Only the
// expert's last tile can be small, with at most 64 rows. It has all that its work tiles need, so
// that they are written without further loads.
struct TileRun {
  int begin, size, small;      // small: order index of the small tile, or -1
  int tile, expert, rows_end;  // tile: at the order index; rows_end: behind the expert's last row

  // expert: whose weights it takes.
  TileRun() = default;
  __device__ TileRun(const Order& order, int index) {
    tile = order.tile(index);
    const int of_plan = order.tiles.tile_expert[tile];
    expert = of_plan % order.num_weights;
    const int first_row = order.tiles.expert_offsets[of_plan];
    rows_end = first_row + order.tiles.expert_rows[of_plan];
    const int first = first_row / BLOCK_M, last = (rows_end - 1) / BLOCK_M;
    // How many tiles of the run follow in that direction, by bisection.
    const auto extent = [&](int direction) {
      const int step = order.backwards ? -direction : direction;
      int low = 0, high = step > 0 ? last - tile : tile - first;
      high = min(high, direction > 0 ? order.num_tiles - 1 - index : index);
      while (low < high) {
        const int middle = (low + high + 1) / 2;
        const bool same = order.tile(index + direction * middle) == tile + step * middle;
        low = same ? middle : low;
        high = same ? high : middle - 1;
      }
      return low;
    };
    begin = index - extent(-1);
    size = index + extent(1) + 1 - begin;
    const int end = order.backwards ? begin : begin + size - 1;
    small = rows(tile + abs(end - index)) <= BLOCK_M / 2 ? end : -1;
  }
  __device__ int rows(int tile) const { return min(BLOCK_M, rows_end - tile * BLOCK_M); }
  __device__ int pairs() const { return (size - (small >= 0)) / 2; }
  __device__ int singles() const { return size - 2 * pairs(); }
  // Large tiles of the run before an order index.
  __device__ int large_before(int index) const {
    return index - begin - (small >= 0 && small < index);
  }
  // Steps of the run for `n_tiles` N-tiles: a pair takes one N-tile a step, a single tile two.
  __device__ int steps(int n_tiles) const {
    return pairs() * n_tiles + singles() * ((n_tiles + 1) / 2);
  }
};

__device__ inline WorkTile work_tile_of(const TileRun& run, int tile, int n_tile, u32 a, u32 b) {
  return {tile, n_tile, run.expert, static_cast<u16>(run.rows(tile)), static_cast<u16>(a | b << 2)};
}

// A tile run and its first step in the list.
struct alignas(16) PlacedRun {
  TileRun run;
  int step;
};

// Writes the step that belongs to the tile at `index` and N-tile first + n_tile of an N-chunk, if
// there is one: for a pair, the second tile writes; for a single tile, every other N-tile.
__device__ inline void write_step(const Order& order, const PlacedRun& placed, int index, int first,
                                  int n_tiles, const Divisor& raster_group, int n_tile,
                                  WorkTile* work_tiles) {
  const TileRun& run = placed.run;
  const int pairs = run.pairs(), large = run.large_before(index);
  const int in = raster_group.remainder(n_tile), done = n_tile - in;
  const int here = min(raster_group.divisor(), n_tiles - done);
  const bool is_small = index == run.small, paired = !is_small && large < 2 * pairs;
  if (paired ? large % 2 == 0 : in % 2 != 0) return;
  const int single = (run.small >= 0 && run.small < index) + max(0, large - 2 * pairs);
  int step = placed.step + run.steps(done);
  step += paired ? large / 2 * here + in : pairs * here + single * ((here + 1) / 2) + in / 2;
  const bool both = paired || in + 1 < here;
  const int before = index - 1 == run.small ? 2 : 1;  // the first tile of the pair
  const int mate = run.tile + (order.backwards ? before : -before);
  const u32 one = both ? kFirstHalf : kBothHalves, other = is_small ? kNoHalf : kSecondHalf;
  WorkTile* out = work_tiles + 2ll * step;
  out[0] = work_tile_of(run, paired ? mate : run.tile, first + n_tile, paired ? kBothHalves : one,
                        paired ? kFirstHalf : kBothHalves);
  out[1] = both ? work_tile_of(run, run.tile, first + n_tile + !paired,
                               paired ? kBothHalves : other, paired ? kSecondHalf : kBothHalves)
                : WorkTile{-1, 0, 0, 0, 0};
}

// Writes share `share` of `shares` of the list of a pipeline chunk. Returns its steps.
template <int kThreads>
__device__ inline int write_steps(const TileOrderParams& p, const Order& order, int chunk,
                                  const Team<kThreads>& team, int share, int shares,
                                  PlacedRun* placed) {
  WorkTile* work_tiles = p.work_tiles + 2ll * chunk * p.max_steps;
  const Divisor raster_group(p.raster_group);
  int before = 0;
  for (int n_tile = 0; n_tile < p.num_n_tiles; n_tile += p.n_chunk) {
    const int n_tiles = min(p.n_chunk, p.num_n_tiles - n_tile);
    const Divisor by_n_tiles(n_tiles);
    for (int first = 0; first < order.num_tiles; first += kThreads) {
      const int index = first + team.thread;
      const bool used = index < order.num_tiles;
      const TileRun run(order, used ? index : first);
      const int steps = run.steps(n_tiles);
      const int mine = used && run.begin == index ? steps : 0;
      int total;
      const int base = before + team.scan(mine, &total) + mine - steps;
      placed[team.thread] = {run, base};
      team.sync();
      const int count = min(kThreads, order.num_tiles - first) * n_tiles;
      for (int i = share * kThreads + team.thread; i < count; i += shares * kThreads) {
        const int of_run = by_n_tiles.quotient(i);
        write_step(order, placed[of_run], first + of_run, n_tile, n_tiles, raster_group,
                   i - of_run * n_tiles, work_tiles);
      }
      before += total;  // barriers of the next scan() keep `placed` until all have read it
    }
  }
  if (share == 0 && team.thread == 0) {
    p.num_steps[3 * chunk] = before;
    p.progress[3 * chunk] = p.progress[3 * chunk + 1] = 0;
  }
  return before;
}

// By a team: share `share` of `shares`. placed: [kThreads], in shared memory; free again behind the
// team's next barrier. Returns the steps of the last list.
template <int kThreads>
__device__ inline int write_tile_order(const TileOrderParams& p, const PlannedTiles& tiles,
                                       const Team<kThreads>& team, int share, int shares,
                                       PlacedRun* placed) {
  const int num_tiles = *tiles.num_tiles;
  int steps = 0, first = 0;
  for (int chunk = 0; chunk < p.num_pipeline_chunks; ++chunk) {
    const bool is_last = chunk + 1 == p.num_pipeline_chunks;  // most orders have one chunk
    const int end =
        is_last ? num_tiles : pipeline_chunk_begin(num_tiles, chunk + 1, p.num_pipeline_chunks);
    const Order order{tiles, p.backwards != 0, first, end - first, p.num_weights};
    steps = write_steps(p, order, chunk, team, share, shares, placed);
    first = end;
  }
  return steps;
}

}  // namespace cometrt
