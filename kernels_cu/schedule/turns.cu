// The turns of a GEMM from the plan: cometrt/plan/turns.py, bit for bit, without a host
// synchronisation. Each block finds where all runs begin and writes its share of the columns.
#include "common/scan.cuh"
#include "schedule/turns.cuh"

using namespace cometrt;

namespace {

constexpr int kScanThreads = 1024;

// Positions of the plan's order, which a run of tiles of one expert cuts into pieces.
struct Order {
  const TurnsParams& p;
  int num_tiles;

  __device__ int tile(int position) const {
    return p.tile_order[p.backwards ? num_tiles - 1 - position : position];
  }
  __device__ int expert(int position) const { return p.tile_expert[tile(position)]; }
  __device__ bool begins(int position) const {
    return position % p.max_run == 0 || expert(position) != expert(position - 1);
  }
  __device__ int rows(int position) const {
    const int t = tile(position), e = p.tile_expert[t];
    return min(BLOCK_M, p.expert_offsets[e] + p.expert_rows[e] - t * BLOCK_M);
  }
  // Tiles with rows for both warpgroups go in pairs.
  __device__ bool is_large(int position) const { return rows(position) > kHalfM; }
};

struct Run {
  int first, size, num_large;

  __device__ Run(const Order& order, int position) : first(position), num_large(0) {
    while (!order.begins(first)) --first;
    int end = first;
    do {
      num_large += order.is_large(end++);
    } while (end < order.num_tiles && !order.begins(end));
    size = end - first;
  }
  __device__ int num_pairs() const { return num_large / 2; }
  __device__ int num_turns(int columns) const {
    return num_pairs() * columns + (size - 2 * num_pairs()) * ((columns + 1) / 2);
  }
};

__device__ WorkItem item_of(const Order& order, int position, int column, Sharing sharing) {
  const int tile = order.tile(position);
  return {tile, column, order.expert(position), static_cast<u16>(order.rows(position)), sharing};
}

__device__ void write(const TurnsParams& p, const Order& order, const Run& run, int position,
                      int base) {
  const int columns = p.num_columns, pairs = run.num_pairs();
  int larges = 0, mate = -1, singles = 0;  // before this one; the last large one
  for (int i = run.first; i < position; ++i) {
    const bool large = order.is_large(i);
    if (large) mate = i;
    singles += !large;
    larges += large;
  }
  const bool large = order.is_large(position);
  if (large && larges < 2 * pairs) {
    if (larges % 2 == 0) return;  // the second of a pair writes both
    for (int c = blockIdx.x; c < columns; c += gridDim.x) {
      WorkItem* turn = p.items + 2ll * (base + c * pairs + larges / 2);
      turn[0] = item_of(order, mate, c, kSharesB);
      turn[1] = item_of(order, position, c, kSharesB);
    }
    return;
  }
  singles += max(0, larges - 2 * pairs);  // a large one that is left over, in its place
  const int half = (columns + 1) / 2;
  for (int i = blockIdx.x; i < half; i += gridDim.x) {
    WorkItem* turn = p.items + 2ll * (base + pairs * columns + singles * half + i);
    const bool both = 2 * i + 1 < columns;
    turn[0] = item_of(order, position, 2 * i, both ? kSharesA : kSharesNothing);
    turn[1] = both ? item_of(order, position, 2 * i + 1, kSharesA)
                   : WorkItem{-1, 0, 0, 0, kSharesNothing};
  }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kScanThreads, 1)
    turns(const __grid_constant__ TurnsParams p) {
  __shared__ int shared[kScanThreads / 32];
  const Order order{p, *p.num_tiles};
  int before = 0;
  for (int first = 0; first < order.num_tiles; first += kScanThreads) {
    const int position = first + threadIdx.x;
    const bool used = position < order.num_tiles;
    const Run run = used ? Run(order, position) : Run(order, first);
    const int turns = run.num_turns(p.num_columns);
    int total;
    const bool begins = used && run.first == position;
    const int upto = block_scan(begins ? turns : 0, shared, &total) + (begins ? turns : 0);
    // max_run divides kScanThreads: a run lies within one round.
    if (used) write(p, order, run, position, before + upto - turns);
    before += total;
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) *p.num_turns = before;
}
