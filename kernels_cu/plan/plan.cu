// The device planner: the tables of cometrt/plan/reference.py, bit for bit, in one launch and
// without host synchronisation. `plan` makes only the plan. `prepare` is everything between
// `await_sources` and the first GEMM of a forward: it copies all ranks' routing, plans, and writes
// the tile orders of both GEMMs. plan_small.cu does the same by one block, for exchanges of few
// pairs, and waits for all ranks itself.
//
// Five steps, in this order:
//   1. count:   copy ids, count pairs by expert        (counts.cuh)
//   2. tile:    tiles and orders of all ranks; weights (tiles.cuh, counts.cuh)
//   3. place:   the row of each pair                   (row_tables.cuh)
//   4. sum:     prefix sums along the orders           (row_tables.cuh)
//   5. stage:   pulls, sends and staging rows          (row_tables.cuh)
//
// Blocks pop a step's items from a queue (work_queue.cuh). A grid barrier ends the step when all
// its items are done (GridSteps). It counts items and not blocks, so any number of resident blocks
// makes progress. A block that starts late finds the queues empty.
//
// Latency bounds the planner: chains of dependent loads, and grid barriers. So an item issues its
// loads together, independent work shares a step, and router weights cross the link during step 2.
//
// A run (c, s, i) is the set of rows of source s in the tile with order index i of rank c. Rows of
// one expert and source lie in token order. So a run is a range of the sorted pairs of (s, expert),
// and every rank derives every other's runs from pair counts alone.
#include "plan/counts.cuh"
#include "plan/padding.cuh"
#include "plan/row_tables.cuh"
#include "plan/tiles.cuh"
#include "plan/work_queue.cuh"
#include "scheduler/tile_order.cuh"

using namespace cometrt;

namespace {

constexpr int kBlocksPerSm = COMETRT_PLAN_BLOCKS_PER_SM;
constexpr u64 kPlanAloneNs = 10000000000ull;  // deadline of `plan`, which has no world's timeout

// Shared memory of a block.
struct BlockState {
  int warps[kWarps];  // for PlanTeam::scan
  int item;           // the last popped item
  bool goes_on;       // result of GridSteps::end
};

template <typename Calls>
struct GridSteps {
  PlanProgress& progress;
  BlockState& block;
  const Calls& calls;

  __device__ WorkQueue queue(WorkList list, int count) {
    return WorkQueue(&progress.queue_heads[list], count);
  }
  // The grid barrier that ends a step. Thread 0 adds this block's `mine` items to done[step], a
  // release at gpu scope after the block's barrier, then acquires `all` of them; the barrier behind
  // it passes that on. False if the wait failed: then the block returns.
  __device__ bool end(PlanStep step, int mine, int all) {
    u32* done = &progress.done[step];
    __syncthreads();
    if (threadIdx.x == 0) {
      if (mine > 0) add_release_gpu(done, mine);
      block.goes_on = calls.wait(step, done, static_cast<u32>(all));
    }
    __syncthreads();
    return block.goes_on;
  }
};

// All steps. Returns true in one thread of the grid, after the last item of the last step. Tables
// stay unfilled if the routing is wrong or a rank exceeds its capacity. `calls` has what differs
// between planning alone and planning for a call:
//   find_routing(token_tile, source): a Routing;
//   copy_weights(token_tile, source): the end of their link transfer;
//   agree(): by a warp, whether all ranks make the same call;
//   wait(step, flag, count): by one thread, for GridSteps;
//   num_orders(), order(team, i): items that need only this rank's tiles: tile orders and padding.
// Shared memory: _shared_words of cometrt/cuda/planner.py.
template <typename Calls>
__device__ bool make_plan(const PlanParams& p, u32* shared, BlockState& block, const Calls& calls) {
  const PlanTeam team = PlanTeam::of_block(block.warps);
  GridSteps<Calls> steps{*p.progress, block, calls};
  const int size = p.g.size, token_tiles = num_token_tiles(p), rank = p.g.rank;
  const int pairs = token_tiles * size;
  int *words = reinterpret_cast<int*>(shared), *item = &block.item;
  const int slices = gridDim.x;
  auto to_count = steps.queue(kCountList, pairs), to_clear = steps.queue(kClearList, slices);
  int done = 0;
  const auto clear = [&] {
    const int slice = to_clear.pop(item);
    const long long first = static_cast<long long>(slice) * kTokenTile + team.thread;
    if (slice >= 0) clear_tables(p, first, static_cast<long long>(slices) * kTokenTile), ++done;
    return slice >= 0;
  };
  for (int i; (i = to_count.pop(item)) >= 0; ++done) {  // each rank starts at its own source
    const int source = (rank + i) % size;
    const Routing routing = calls.find_routing(i / size, source);
    count_pairs(p, team, i / size, source, routing, shared,
                clear);  // clears tables while ids arrive
  }
  while (clear()) {
  }
  const int num_tile_items = size + 1 + num_token_tile_sums(p);
  auto to_tile = steps.queue(kTileList, num_tile_items + pairs);
  if (!steps.end(kCounted, done, pairs + slices)) return false;
  let_next_kernel_begin();  // all ranks have published

  u64 transferred_ns = 0;
  done = 0;
  for (int i; (i = to_tile.pop(item)) >= 0; ++done) {
    if (i < size) {
      make_tiles(p, team, i, words);
    } else if (i == size) {
      make_bases(p, team, words);
      if (team.thread < 32 && !calls.agree()) atomicMax(&p.progress->largest_need, ~0ull);
    } else if (i < num_tile_items) {
      sum_token_tiles(p, team, i - size - 1);
    } else {
      const int at = i - num_tile_items;
      transferred_ns = max(transferred_ns, calls.copy_weights(team, at / size, (rank + at) % size));
    }
  }
  wait_transferred(transferred_ns);
  auto to_place = steps.queue(kPlaceList, pairs);
  if (!steps.end(kTiled, done, num_tile_items + pairs)) return false;
  if (p.progress->wrong_pair != 0 || p.progress->largest_need != 0) return false;

  done = 0;
  for (int i; (i = to_place.pop(item)) >= 0; ++done) {  // own token tiles first: the longest
    place_rows<kPairsAtOnce>(p, team, i % token_tiles, (rank + i / token_tiles) % size, shared);
  }
  // Idle blocks do these before the barrier; step 5 counts them.
  auto to_order = steps.queue(kOrderList, calls.num_orders());
  int ordered = 0;
  for (int i; (i = to_order.pop(item)) >= 0; ++ordered) calls.order(team, i);
  auto to_sum = steps.queue(kSumList, num_run_sums(p));
  if (!steps.end(kPlaced, done, pairs)) return false;

  done = 0;
  for (int i; (i = to_sum.pop(item)) >= 0; ++done) sum_runs(p, team, i);
  const int groups = (p.g.max_tiles + 31) / 32;  // of order indices
  const int staging_items = size * groups, all = staging_items + p.g.max_tiles;
  const int parts = (all + kWarps - 1) / kWarps;
  auto to_stage = steps.queue(kStagingList, parts);
  if (!steps.end(kSummed, done, num_run_sums(p))) return false;

  done = ordered;
  for (int part; (part = to_stage.pop(item)) >= 0; ++done) {
    const int i = threadIdx.x / 32 * parts + part;  // one a warp, spread over blocks
    if (i < staging_items) {
      place_staging_rows<32, kRowsAtOnce>(p, i % size, i / size * 32);
    } else if (i < all) {
      place_pulls<kRowsAtOnce>(p, i - staging_items);
    }
  }
  __syncthreads();
  if (threadIdx.x != 0 || done == 0) return false;
  const u32 planned = fetch_add_relaxed_gpu(&p.progress->done[kPlanned], done);
  return planned + done == static_cast<u32>(calls.num_orders() + parts);
}

// `plan`: from routing tables that are already in PlanParams.
struct PlanAlone {
  const PlanParams& p;

  __device__ long long pairs() const { return static_cast<long long>(p.g.max_tokens) * p.g.topk; }
  __device__ Routing find_routing(int, int source) const {
    return {p.num_tokens[source], p.ids + source * pairs(), 0};
  }
  __device__ u64 copy_weights(const PlanTeam& team, int token_tile, int source) const {
    return cometrt::copy_weights(p, team, token_tile, source, p.weights + source * pairs(),
                                 nullptr);
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
  __device__ void order(const PlanTeam&, int) const {}
};

// `prepare`: the plan of a forward from all ranks' heaps, the tile orders of both GEMMs, and zeros
// in the padding rows of params.rows for dispatch_gemm.
struct PlanOfCall {
  const ExchangeParams& params;
  const PlanParams& p;
  const TileOrderParams &up, &down;
  const EmulatedLink& link;
  int pads;  // whether it also zeroes padding rows

  __device__ Routing find_routing(int token_tile, int source) const {
    return cometrt::find_routing(params, link, p, token_tile, source);
  }
  __device__ u64 copy_weights(const PlanTeam& team, int token_tile, int source) const {
    const u64 epoch = params.world.epoch();
    const float* weights = params.routing<float>(source, epoch, params.weights_offset);
    return cometrt::copy_weights(p, team, token_tile, source, weights, &link);
  }
  __device__ bool agree() const { return all_agree(params, params.world.epoch()); }
  // Its deadline is longer than that of waits for peers within a step, whose reports say more.
  __device__ bool wait(PlanStep step, const u32* flag, u32 count) const {
    return wait_until(
        params.world, {kPlanStep, params.world.rank, step, -1}, params.world.epoch(), count,
        [&] { return load_acquire_gpu(flag); }, COMETRT_PLAN_PATIENCE);
  }
  // Shares of each GEMM's tile order. A share reads the whole plan and writes a part of the list.
  __device__ int num_order_shares() const {
    return up.work_tiles == nullptr ? 0 : static_cast<int>(max(2u, gridDim.x / 8));
  }
  __device__ int num_padding_shares() const { return pads ? gridDim.x : 0; }
  __device__ int num_orders() const { return 2 * num_order_shares() + num_padding_shares(); }
  __device__ void order(const PlanTeam& team, int i) const {
    __shared__ PlacedRun placed[kTokenTile];
    const int shares = num_order_shares();
    if (i >= 2 * shares) {
      const int warp = (i - 2 * shares) * kWarps + threadIdx.x / 32;
      zero_padding_rows(params, params.rows, BLOCK_K, warp, num_padding_shares() * kWarps);
      return;
    }
    const PlannedTiles tiles{p.tile_order, p.out_num_tiles, p.tile_expert, p.expert_offsets,
                             p.expert_rows};
    write_tile_order(i < shares ? up : down, tiles, team, i % shares, shares, placed);
  }
};

}  // namespace

// wait_for_previous_kernel().
extern "C" __constant__ const int begins_early = 1;

extern "C" __global__ void __launch_bounds__(kTokenTile, kBlocksPerSm)
    plan(const __grid_constant__ PlanParams p) {
  extern __shared__ uint4 shared[];
  __shared__ BlockState block;
  wait_for_previous_kernel();
  make_plan(p, reinterpret_cast<u32*>(shared), block, PlanAlone{p});
}

// Sets params.state->ok at the end: later kernels do nothing while it is 0. pads: whether a fused
// backward will read rows of this forward.
extern "C" __global__ void __launch_bounds__(kTokenTile, kBlocksPerSm)
    prepare(const __grid_constant__ ExchangeParams params, const __grid_constant__ PlanParams p,
            const __grid_constant__ TileOrderParams up,
            const __grid_constant__ TileOrderParams down, const __grid_constant__ EmulatedLink link,
            const __grid_constant__ int pads) {
  extern __shared__ uint4 shared[];
  __shared__ BlockState block;
  wait_for_previous_kernel();
  if (params.state->status != kActive) return;
  const PlanOfCall calls{params, p, up, down, link, pads};
  const bool planned = make_plan(p, reinterpret_cast<u32*>(shared), block, calls);
  if (planned) params.state->ok = 1;
}
