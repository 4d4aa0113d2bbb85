// The device planner: the tables of cometrt/plan/reference.py, bit for bit, in one launch and
// without a host synchronisation. Read the steps in order; each says what it adds. `prepare` is all
// of a forward that comes before dispatch_gemm: it also waits for all ranks, takes their routing,
// and writes the tile orders of both GEMMs.
//
// The planner is bound by latency: by the number of loads that depend on each other, and by the
// number of times that all blocks wait for each other. So an item's loads are issued together,
// steps that do not depend on each other are one step, and router weights cross the link while
// tiles are made.
//
// Blocks pop a step's items from a queue. A step ends when its items are done, so that any number
// of resident blocks makes progress: other kernels may hold SMs for as long as they run. A block
// that starts late finds the queues empty.
//
// A run (c, s, i) is the rows of source s in the tile with order index i of rank c. Rows of one
// expert and source lie in token order, so a run is a range of the sorted pairs of (s, expert), and
// every rank finds the runs of every other from pair counts alone. It needs those of its own rows,
// whose pairs lie sorted in row_pair, and those of its own tokens on all ranks.
#include "plan/counts.cuh"
#include "plan/padding.cuh"
#include "plan/places.cuh"
#include "plan/tiles.cuh"
#include "plan/work_queue.cuh"
#include "scheduler/tile_order.cuh"

using namespace cometrt;

namespace {

constexpr int kBlocksPerSm = COMETRT_PLAN_BLOCKS_PER_SM;
constexpr u64 kPlanAloneNs = 10000000000ull;  // the deadline of `plan`, which has no world

// What a block's threads share.
struct BlockState {
  int warps[kWarps];  // for block_scan
  int item;           // the one that the block has popped
  bool goes_on;
};

// Ends a step: this block's items of it are done; waits until those of all blocks are. False if the
// wait ended without them: then the block leaves.
template <typename Calls>
__device__ bool end_step(const PlanParams& p, BlockState& block, const Calls& calls, PlanStep step,
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

// All steps. What differs between the two kernels is in `calls`: find(token_tile, source), see
// Routing; take(token_tile, source) brings weights and returns when they will have crossed;
// agree(), by one thread: whether all ranks make the same call; wait(step, flag, count);
// num_orders(), order(i): items that need only the tiles of this rank. True for one thread of the
// grid, when all is done and the tables are filled. Nothing reads the tables of a call that is
// wrong: they are not filled. Shared memory: _shared_words of cometrt/cuda/planner.py.
template <typename Calls>
__device__ bool make_plan(const PlanParams& p, u32* shared, BlockState& block, const Calls& calls) {
  const int size = p.g.size, token_tiles = num_token_tiles(p), rank = p.g.rank;
  const int pairs = token_tiles * size;
  int *words = reinterpret_cast<int*>(shared), *item = &block.item;
  const auto queue = [&](WorkList list, int count) {
    return WorkQueue(&p.progress->queue_heads[list], count);
  };
  const auto end = [&](PlanStep step, int mine, int all) {
    return end_step(p, block, calls, step, mine, all);
  };

  const int slices = gridDim.x;
  WorkQueue to_count = queue(kCountList, pairs), to_clear = queue(kClearList, slices);
  int done = 0;
  const auto clear = [&] {
    const int slice = to_clear.pop(item);
    if (slice >= 0) clear_tables(p, slice, slices), ++done;
    return slice >= 0;
  };
  for (int i; (i = to_count.pop(item)) >= 0; ++done) {  // ranks read from each other evenly
    const int source = (rank + i) % size;
    const Routing routing = calls.find(i / size, source);
    count_pairs(p, i / size, source, routing, shared, clear);  // clears while ids arrive
  }
  while (clear()) {
  }
  const int columns = p.g.num_experts + size * p.g.local_experts;
  const int before_takes = size + 1 + (columns + kWarps - 1) / kWarps;
  WorkQueue to_tile = queue(kTileList, before_takes + pairs);
  if (!end(kCounted, done, pairs + slices)) return false;

  u64 transferred_ns = 0;
  done = 0;
  for (int i; (i = to_tile.pop(item)) >= 0; ++done) {
    if (i < size) {
      make_tiles(p, i, words, block.warps);
    } else if (i == size) {
      make_bases(p, words, block.warps);
      if (threadIdx.x == 0 && !calls.agree()) atomicMax(&p.progress->largest_need, ~0ull);
    } else if (i < before_takes) {
      sum_token_tiles(p, (i - size - 1) * kWarps + threadIdx.x / 32);
    } else {
      const int at = i - before_takes;
      transferred_ns = max(transferred_ns, calls.take(at / size, (rank + at) % size));
    }
  }
  wait_transferred(transferred_ns);
  WorkQueue to_place = queue(kPlaceList, pairs);
  if (!end(kTiled, done, before_takes + pairs)) return false;
  if (p.progress->wrong_pair != 0 || p.progress->largest_need != 0) return false;

  done = 0;
  for (int i; (i = to_place.pop(item)) >= 0; ++done) {  // own token tiles take longest: first
    place_rows(p, i % token_tiles, (rank + i / token_tiles) % size, shared);
  }
  // For blocks that have nothing else to do: so no ticket is requested ahead.
  WorkQueue to_order = queue(kOrderList, calls.num_orders());
  int ordered = 0;
  for (int i; (i = to_order.pop(item)) >= 0; ++ordered) calls.order(i, block.warps);
  WorkQueue to_sum = queue(kSumList, 1 + 2 * size);
  if (!end(kPlaced, done, pairs)) return false;

  done = 0;
  for (int i; (i = to_sum.pop(item)) >= 0; ++done) sum_runs(p, i - 1, block.warps);
  const int groups = (p.g.max_tiles + 31) / 32;  // of order indices
  const int staging_items = size * groups, all = staging_items + p.g.max_tiles;
  const int parts = (all + kWarps - 1) / kWarps;
  WorkQueue to_stage = queue(kStagingList, parts);
  if (!end(kSummed, done, 1 + 2 * size)) return false;

  done = ordered;
  for (int part; (part = to_stage.pop(item)) >= 0; ++done) {
    const int i = threadIdx.x / 32 * parts + part;  // a warp each: neighbours in different blocks
    if (i < staging_items) {
      place_staging_rows(p, i % size, i / size * 32);
    } else if (i < all) {
      place_pulls(p, i - staging_items);
    }
  }
  __syncthreads();
  if (threadIdx.x != 0 || done == 0) return false;
  const u32 planned = fetch_add_relaxed_gpu(&p.progress->done[kPlanned], done);
  return planned + done == static_cast<u32>(calls.num_orders() + parts);
}

// The plan alone, from tables that this rank has already.
struct PlanAlone {
  const PlanParams& p;

  __device__ long long pairs() const { return static_cast<long long>(p.g.max_tokens) * p.g.topk; }
  __device__ Routing find(int, int source) const {
    return {p.num_tokens[source], p.ids + source * pairs(), 0};
  }
  __device__ u64 take(int token_tile, int source) const {
    return take_weights(p, token_tile, source, p.weights + source * pairs(), nullptr);
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

// The plan of a forward, and what follows from it: the tile orders of both GEMMs, and zeros in the
// padding of params.rows where dispatch_gemm fills the rest.
struct PlanOfCall {
  const ExchangeParams& params;
  const PlanParams& p;
  const TileOrderParams &up, &down;
  const EmulatedLink& link;

  __device__ Routing find(int token_tile, int source) const {
    return find_routing(params, link, p, token_tile, source);
  }
  __device__ u64 take(int token_tile, int source) const {
    const u64 epoch = params.world.epoch();
    const float* weights = params.routing<float>(source, epoch, params.weights_offset);
    return take_weights(p, token_tile, source, weights, &link);
  }
  __device__ bool agree() const { return all_agree(params); }
  // More patient than the waits for peers within a step, whose reports say more.
  __device__ bool wait(PlanStep step, const u32* flag, u32 count) const {
    return wait_until(
        params.world, {kPlanStep, params.world.rank, step, -1}, params.world.epoch(), count,
        [&] { return load_acquire_gpu(flag); }, COMETRT_PLAN_PATIENCE);
  }
  // Of each GEMM's order. Every share reads the whole plan and writes a part of the list.
  __device__ int num_order_shares() const {
    return up.work_tiles == nullptr ? 0 : static_cast<int>(max(1u, gridDim.x / 8));
  }
  __device__ int num_padding_shares() const {
    return params.tile_filled == nullptr ? 0 : gridDim.x;
  }
  __device__ int num_orders() const { return 2 * num_order_shares() + num_padding_shares(); }
  __device__ void order(int i, int* warps) const {
    const int shares = num_order_shares();
    if (i >= 2 * shares) {
      const int warp = (i - 2 * shares) * kWarps + threadIdx.x / 32;
      zero_padding_rows(params, warp, num_padding_shares() * kWarps);
      return;
    }
    const PlannedTiles tiles{p.tile_order, p.out_num_tiles, p.tile_expert, p.expert_offsets,
                             p.expert_rows};
    write_tile_order<kTokenTile>(i < shares ? up : down, tiles, i % shares, shares, warps);
  }
};

}  // namespace

extern "C" __global__ void __launch_bounds__(kTokenTile, kBlocksPerSm)
    plan(const __grid_constant__ PlanParams p) {
  extern __shared__ uint4 shared[];
  __shared__ BlockState block;
  make_plan(p, reinterpret_cast<u32*>(shared), block, PlanAlone{p});
}

// Sets params.state->ok, which was 0, when all is done: then later kernels go on.
extern "C" __global__ void __launch_bounds__(kTokenTile, kBlocksPerSm)
    prepare(const __grid_constant__ ExchangeParams params, const __grid_constant__ PlanParams p,
            const __grid_constant__ TileOrderParams up,
            const __grid_constant__ TileOrderParams down,
            const __grid_constant__ EmulatedLink link) {
  extern __shared__ uint4 shared[];
  __shared__ BlockState block;
  if (params.state->status != kActive) return;
  const bool planned =
      make_plan(p, reinterpret_cast<u32*>(shared), block, PlanOfCall{params, p, up, down, link});
  if (planned) params.state->ok = 1;
}
