// The device planner: the tables of cometrt/plan/reference.py, bit for bit, in one launch and
// without a host synchronisation. Read the steps in order; each says what it adds. `prepare` is
// all of a forward that comes before layer0: it also waits for all ranks, takes their routing, and
// orders both GEMMs' tiles.
//
// Few threads wait for one load after the other here, so what matters is how many loads follow from
// each other and how often the blocks wait for each other. What an item needs is loaded together,
// what does not depend on each other shares a step, and weights cross while tiles are made.
//
// Blocks take a step's items one after the other from a list (WorkQueue). A step has ended when its
// items are done, so that any number of resident blocks makes progress: other kernels may hold SMs
// for as long as they run. A block that comes late finds the lists empty.
//
// A segment (c, s, p) is the rows of source s in the p-th tile of rank c's layer0 order. Rows of
// one expert and source lie in token order, so a segment is a stretch of the sorted pairs of
// (s, expert), and every rank can find the segments of every other from pair counts alone. It needs
// those where it is c itself, whose pairs lie sorted in row_pair, and those where it is s.
#include "exchange/pads.cuh"
#include "plan/counts.cuh"
#include "plan/places.cuh"
#include "plan/tiles.cuh"
#include "plan/work_queue.cuh"
#include "schedule/turns.cuh"

using namespace cometrt;

namespace {

constexpr int kBlocksPerSm = 6;               // as many as get by without spills
constexpr u64 kPlanAloneNs = 10000000000ull;  // that a step of `plan` may take

// What a block's threads share.
struct Block {
  int warps[kWarps];  // for block_scan
  int item;           // at hand
  bool goes_on;
};

// Between steps: this block's items of the step are done, and then those of all blocks. False: the
// wait ended without them, and the block leaves.
template <typename Calls>
__device__ bool end_step(const PlanParams& p, Block& block, const Calls& calls, PlanStep step,
                         int mine, int all) {
  u32* done = &p.progress->done[step];
  __syncthreads();
  if (threadIdx.x == 0) {
    if (mine > 0) add_release_gpu(done, mine);
    block.goes_on = calls.wait(step, done, static_cast<u32>(all));
  }
  __syncthreads();
  return block.goes_on;
}

// All steps. What differs between the kernels is in `calls`: find(chunk, source), see Routing;
// take(chunk, source) brings weights and returns when they will have crossed; agree(), by one
// thread: do all ranks call the same?; wait(step, flag, count); num_orders(), order(i): items that
// need the tiles of this rank and nothing else. True for one thread of the grid, when all is done:
// the tables are filled. Those of a call that is wrong are not, and nothing reads them. Shared
// memory: _shared_words of cometrt/cuda/planner.py.
template <typename Calls>
__device__ bool make_plan(const PlanParams& p, u32* shared, Block& block, const Calls& calls) {
  const int size = p.g.size, chunks = num_chunks(p), rank = p.g.rank, pairs = chunks * size;
  int *words = reinterpret_cast<int*>(shared), *item = &block.item;
  const auto queue = [&](WorkList list, int count) {
    return WorkQueue(&p.progress->taken[list], count);
  };
  const auto end = [&](PlanStep step, int mine, int all) {
    return end_step(p, block, calls, step, mine, all);
  };

  const int slices = gridDim.x;
  WorkQueue to_count = queue(kCountList, pairs), to_clear = queue(kClearList, slices);
  int done = 0;
  const auto clear = [&] {
    const int slice = to_clear.take(item);
    if (slice >= 0) clear_tables(p, slice, slices), ++done;
    return slice >= 0;
  };
  for (int i; (i = to_count.take(item)) >= 0; ++done) {  // ranks read from each other evenly
    const int source = (rank + i) % size;
    const Routing routing = calls.find(i / size, source);
    count_pairs(p, i / size, source, routing, shared, clear);  // cleared while ids come
  }
  while (clear()) {
  }
  const int columns = p.g.num_experts + size * p.g.local_experts;
  const int before_takes = size + 1 + (columns + kWarps - 1) / kWarps;
  WorkQueue to_tile = queue(kTileList, before_takes + pairs);
  if (!end(kCounted, done, pairs + slices)) return false;

  u64 crossed_ns = 0;
  done = 0;
  for (int i; (i = to_tile.take(item)) >= 0; ++done) {
    if (i < size) {
      make_tiles(p, i, words, block.warps);
    } else if (i == size) {
      make_bases(p, words, block.warps);
      if (threadIdx.x == 0 && !calls.agree()) atomicMax(&p.progress->largest_need, ~0ull);
    } else if (i < before_takes) {
      sum_chunks(p, (i - size - 1) * kWarps + threadIdx.x / 32);
    } else {
      const int at = i - before_takes;
      crossed_ns = max(crossed_ns, calls.take(at / size, (rank + at) % size));
    }
  }
  wait_crossed(crossed_ns);
  WorkQueue to_place = queue(kPlaceList, pairs);
  if (!end(kTiled, done, before_takes + pairs)) return false;
  if (p.progress->wrong_pair != 0 || p.progress->largest_need != 0) return false;

  done = 0;
  for (int i; (i = to_place.take(item)) >= 0; ++done) {  // own chunks take longest: first
    place_rows(p, i % chunks, (rank + i / chunks) % size, shared);
  }
  // By blocks that have nothing else to do: so it is not asked for ahead.
  WorkQueue to_order = queue(kOrderList, calls.num_orders());
  int ordered = 0;
  for (int i; (i = to_order.take(item)) >= 0; ++ordered) calls.order(i, block.warps);
  WorkQueue to_sum = queue(kSumList, 1 + 2 * size);
  if (!end(kPlaced, done, pairs)) return false;

  done = 0;
  for (int i; (i = to_sum.take(item)) >= 0; ++done) sum_segments(p, i - 1, block.warps);
  const int groups = (p.g.max_tiles + 31) / 32;  // of positions
  const int slots = size * groups, all = slots + p.g.max_tiles, parts = (all + kWarps - 1) / kWarps;
  WorkQueue to_slot = queue(kSlotList, parts);
  if (!end(kSummed, done, 1 + 2 * size)) return false;

  done = ordered;
  for (int part; (part = to_slot.take(item)) >= 0; ++done) {
    const int i = threadIdx.x / 32 * parts + part;  // a warp each: neighbours in different blocks
    if (i < slots) {
      place_slots(p, i % size, i / size * 32);
    } else if (i < all) {
      place_pulls(p, i - slots);
    }
  }
  __syncthreads();
  if (threadIdx.x != 0 || done == 0) return false;
  const u32 planned = fetch_add_relaxed_gpu(&p.progress->done[kPlanned], done);
  return planned + done == static_cast<u32>(calls.num_orders() + parts);
}

// The plan alone, from tables that are there.
struct PlanAlone {
  const PlanParams& p;

  __device__ long long pairs() const { return static_cast<long long>(p.g.max_tokens) * p.g.topk; }
  __device__ Routing find(int, int source) const {
    return {p.num_tokens[source], p.ids + source * pairs(), 0};
  }
  __device__ u64 take(int chunk, int source) const {
    return take_weights(p, chunk, source, p.weights + source * pairs(), nullptr);
  }
  __device__ bool agree() const { return true; }
  __device__ bool wait(PlanStep, const u32* flag, u32 count) const {
    const u64 deadline = global_timer_ns() + kPlanAloneNs;
    while (load_acquire_gpu(flag) < count) {
      if (global_timer_ns() > deadline) return false;
    }
    return true;
  }
  __device__ int num_orders() const { return 0; }
  __device__ void order(int, int*) const {}
};

// The plan of a forward, and what follows from it: the turns of both GEMMs, and pads of c.rows
// where layer0 fills them.
struct PlanOfCall {
  const Call& c;
  const PlanParams& p;
  const TurnsParams &up, &down;
  const Pace& pace;

  __device__ Routing find(int chunk, int source) const {
    return find_routing(c, pace, p, chunk, source);
  }
  __device__ u64 take(int chunk, int source) const {
    const float* weights = c.routing<float>(source, c.world.epoch(), c.weights_at);
    return take_weights(p, chunk, source, weights, &pace);
  }
  __device__ bool agree() const { return all_agree(c); }
  // More patient than the waits for peers within a step, which say more.
  __device__ bool wait(PlanStep step, const u32* flag, u32 count) const {
    return wait_until(
        c.world, {kPlanStep, c.world.rank, step, -1}, c.world.epoch(), count,
        [&] { return load_acquire_gpu(flag); }, 2);
  }
  // Of each GEMM. Every one reads the whole order, and writes its share of the turns.
  __device__ int num_turns() const {
    return up.items == nullptr ? 0 : static_cast<int>(max(1u, gridDim.x / 8));
  }
  __device__ int num_pads() const { return c.tile_filled == nullptr ? 0 : gridDim.x; }
  __device__ int num_orders() const { return 2 * num_turns() + num_pads(); }
  __device__ void order(int i, int* warps) const {
    const int turns = num_turns();
    if (i >= 2 * turns) {
      zero_pad_rows(c, (i - 2 * turns) * kWarps + threadIdx.x / 32, num_pads() * kWarps);
      return;
    }
    const PlannedTiles tiles{p.tile_order, p.out_num_tiles, p.tile_expert, p.expert_offsets,
                             p.expert_rows};
    write_turns<kChunk>(i < turns ? up : down, tiles, i % turns, turns, warps);
  }
};

}  // namespace

extern "C" __global__ void __launch_bounds__(kChunk, kBlocksPerSm)
    plan(const __grid_constant__ PlanParams p) {
  extern __shared__ uint4 shared[];
  __shared__ Block block;
  make_plan(p, reinterpret_cast<u32*>(shared), block, PlanAlone{p});
}

// Sets c.state->ok, which was 0, when all is done: then later kernels go on.
extern "C" __global__ void __launch_bounds__(kChunk, kBlocksPerSm)
    prepare(const __grid_constant__ Call c, const __grid_constant__ PlanParams p,
            const __grid_constant__ TurnsParams up, const __grid_constant__ TurnsParams down,
            const __grid_constant__ Pace pace) {
  extern __shared__ uint4 shared[];
  __shared__ Block block;
  if (c.state->status != kActive) return;
  const bool planned =
      make_plan(p, reinterpret_cast<u32*>(shared), block, PlanOfCall{c, p, up, down, pace});
  if (planned) c.state->ok = 1;
}
