// The planner of small exchanges: the steps of plan.cu by one thread block. What a step reads of
// earlier ones lies in shared memory, and a barrier of the block ends a step. So few loads from
// global memory depend on each other: the status, source_ready, the header, then ids and weights.
//
// The block is kTeams teams of 128 threads. They take the items of a step in turn, each with
// scratch and a named barrier of its own. Tables that no step reads again go to global memory as
// they are made, the others at the end.
#include "plan/counts.cuh"
#include "plan/padding.cuh"
#include "plan/row_tables.cuh"
#include "plan/tiles.cuh"
#include "scheduler/tile_order.cuh"

using namespace cometrt;

namespace {

constexpr int kTeams = COMETRT_PLAN_TEAMS, kThreads = kTeams * kTokenTile;
constexpr int kRuns = 4;  // that a warp walks in step 5: runs are short, and warps many
// cometrt/cuda/planner.py gives a team's scratch room for so many.
static_assert(sizeof(PlacedRun) == 32);

template <typename T>
__device__ void put(T*& table, char* shared, int offset) {
  table = reinterpret_cast<T*>(shared + offset);
}

// `p` with the tables of `at` in shared memory. clear_tables() then clears what lies in global
// memory.
__device__ PlanParams in_shared(PlanParams p, const SharedTables& at, char* shared) {
  put(p.ids, shared, at.ids), put(p.weights, shared, at.weights);
  put(p.num_tokens, shared, at.num_tokens);
  put(p.token_tile_counts, shared, at.token_tile_counts), put(p.counts, shared, at.counts);
  put(p.token_counts, shared, at.token_counts), put(p.list_start, shared, at.list_start);
  put(p.pair_list, shared, at.pair_list), put(p.rank_rows, shared, at.rank_rows);
  put(p.rank_num_tiles, shared, at.rank_num_tiles), put(p.rank_order, shared, at.rank_order);
  put(p.rank_tile_order_idx, shared, at.rank_tile_order_idx);
  put(p.run_counts, shared, at.run_counts), put(p.run_starts, shared, at.run_starts);
  put(p.column_tokens, shared, at.column_tokens);
  put(p.first_order_idx, shared, at.first_order_idx);
  put(p.expert_offsets, shared, at.expert_offsets), put(p.expert_rows, shared, at.expert_rows);
  put(p.row_pair, shared, at.row_pair), put(p.out_num_tiles, shared, at.out_num_tiles);
  put(p.tile_expert, shared, at.tile_expert), put(p.tile_order, shared, at.tile_order);
  put(p.pull_offsets, shared, at.pull_offsets), put(p.send_offsets, shared, at.send_offsets);
  put(p.block_tokens, shared, at.block_tokens), put(p.staging_base, shared, at.staging_base);
  p.tables += at.kept_bytes / 4, p.num_words -= at.kept_bytes / 4;
  return p;
}

// By thread `first` of `step`: fills `bytes` of shared memory with a word.
__device__ void fill(char* to, int bytes, int word, int first, int step) {
#pragma unroll 1
  for (int i = first; i < bytes / 16; i += step) {
    reinterpret_cast<int4*>(to)[i] = make_int4(word, word, word, word);
  }
}

// By all threads: leaves what is wrong for the report of `finish`, with the routing that it shows.
__device__ void leave_failure(const PlanParams& out, const PlanParams& p) {
  for (int i = threadIdx.x; i < p.g.size * p.g.max_tokens * p.g.topk; i += kThreads) {
    out.ids[i] = p.ids[i], out.weights[i] = p.weights[i];
  }
  if (threadIdx.x != 0) return;
  out.progress->wrong_pair = p.progress->wrong_pair;
  out.progress->largest_need = p.progress->largest_need;
}

// Shares the items of a step among the teams.
class Items {
 public:
  __device__ explicit Items(const PlanTeam& team) : team_(team), next_(threadIdx.x / kTokenTile) {}

  // By all threads: work(i) for this team's items of [0, count). The first one goes to the team
  // behind that of the last item so far.
  template <typename Work>
  __device__ void run(int count, Work work) {
#pragma unroll 1
    for (; next_ < count; next_ += kTeams) {
      work(next_);
      team_.sync();  // the team's scratch is free again
    }
    next_ -= count;
  }

 private:
  const PlanTeam& team_;
  int next_;
};

// All steps, by all threads. Returns whether there is a plan, to all of them. `call` has what
// differs between planning alone and planning for a call:
//   wait_source(s): by one thread, the number of the source's tokens, or -1;
//   ids(s), weights(s): the source's routing;
//   agree(): by a warp, whether all ranks make the same call;
//   num_orders(count), order(tiles, team, placed, i, n): items that need only this rank's tiles.
template <typename Call>
__device__ bool make_small_plan(const PlanParams& out, const SharedTables& at, char* shared,
                                const Call& call) {
  __shared__ PlanProgress progress;
  __shared__ int warps[kTeams][kWarps];
  PlanParams p = in_shared(out, at, shared);
  p.progress = &progress;
  const int team_idx = threadIdx.x / kTokenTile, warp = threadIdx.x / 32;
  const PlanTeam team{static_cast<int>(threadIdx.x) % kTokenTile, warps[team_idx], 1 + team_idx};
  u32* words = reinterpret_cast<u32*>(shared + at.team + team_idx * at.team_bytes);
  const int size = p.g.size, token_tiles = num_token_tiles(p), rank = p.g.rank;
  const int pairs = token_tiles * size;

  if (warp == 0) {  // a lane a source, while the other warps clear tables
    for (int s = threadIdx.x; s < size; s += 32) p.num_tokens[s] = call.wait_source(s);
  } else {
    const int first = threadIdx.x - 32, step = kThreads - 32;
    if (first == 0) progress.wrong_pair = progress.largest_need = 0;
    fill(shared, at.zero_bytes, 0, first, step);
    fill(shared + at.zero_bytes, at.kept_bytes, -1, first, step);
    clear_tables(p, first, step);
  }
  __syncthreads();
  let_next_kernel_begin();  // all ranks have published

  Items items(team);  // 1. count, and copy weights
  items.run(pairs, [&](int i) {
    const int source = (rank + i) % size;
    const Routing routing{p.num_tokens[source], call.ids(source), 0};
    count_pairs(p, team, i / size, source, routing, words, [] {});
  });
  items.run(pairs, [&](int i) {
    const int source = (rank + i) % size;
    copy_weights(p, team, i / size, source, call.weights(source), nullptr);
  });
  __syncthreads();

  items.run(1, [&](int) {  // 2. tile; the comparison of headers takes longest
    if (team.thread < 32 && !call.agree()) atomicMax(&progress.largest_need, ~0ull);
  });
  items.run(size, [&](int c) { make_tiles(p, team, c, reinterpret_cast<int*>(words)); });
  items.run(1, [&](int) { make_bases(p, team, reinterpret_cast<int*>(words)); });
  items.run(num_token_tile_sums(p), [&](int i) { sum_token_tiles(p, team, i); });
  __syncthreads();
  if (progress.wrong_pair != 0 || progress.largest_need != 0) {
    leave_failure(out, p);
    return false;
  }

  items.run(pairs, [&](int i) {  // 3. place, own token tiles first; tile orders beside it
    place_rows<1>(p, team, i % token_tiles, (rank + i / token_tiles) % size, words);
  });
  const int orders = call.num_orders(pairs);
  items.run(orders, [&](int i) {
    const PlannedTiles tiles{p.tile_order, p.out_num_tiles, p.tile_expert, p.expert_offsets,
                             p.expert_rows};
    call.order(tiles, team, reinterpret_cast<PlacedRun*>(words), i, orders);
  });
  __syncthreads();

  items.run(num_run_sums(p), [&](int i) { sum_runs(p, team, i); });  // 4. sum
  __syncthreads();

  // 5. stage, a warp an item.
  const int groups = (p.g.max_tiles + kRuns - 1) / kRuns, staging_items = (size - 1) * groups;
  const Divisor by_groups(groups);
#pragma unroll 1
  for (int i = warp; i < staging_items + p.g.max_tiles; i += kThreads / 32) {
    if (i < staging_items) {
      const int d = by_groups.quotient(i);
      place_staging_rows<kRuns, 1>(p, rank_at(p.g, rank, d + 1), (i - d * groups) * kRuns);
    } else {
      place_pulls<1>(p, i - staging_items);
    }
  }
  const int4* kept = reinterpret_cast<const int4*>(shared + at.zero_bytes);
#pragma unroll 4
  for (int i = threadIdx.x; i < at.kept_bytes / 16; i += kThreads) {
    reinterpret_cast<int4*>(out.tables)[i] = kept[i];
  }
  return true;
}

// From routing tables that are already in PlanParams.
struct PlanAlone {
  const PlanParams& out;

  __device__ long long pairs() const {
    return static_cast<long long>(out.g.max_tokens) * out.g.topk;
  }
  __device__ int wait_source(int s) const { return out.num_tokens[s]; }
  __device__ const int* ids(int s) const { return out.ids + s * pairs(); }
  __device__ const float* weights(int s) const { return out.weights + s * pairs(); }
  __device__ bool agree() const { return true; }
  __device__ int num_orders(int) const { return 0; }
  __device__ void order(const PlannedTiles&, const PlanTeam&, PlacedRun*, int, int) const {}
};

// From all ranks' heaps.
struct PlanOfCall {
  const ExchangeParams& params;
  u64 epoch;
  const TileOrderParams &up, &down;
  const EmulatedLink& link;

  // Ids and weights cross the link in one transfer.
  __device__ int wait_source(int s) const {
    const int tokens = cometrt::wait_source(params, epoch, s);
    const u64 bytes = s == params.world.rank ? 0 : 8ull * max(0, tokens) * params.g.topk;
    wait_transferred(begin_transfer(link, bytes));
    return tokens;
  }
  __device__ const int* ids(int s) const {
    return params.routing<int>(s, epoch, params.ids_offset);
  }
  __device__ const float* weights(int s) const {
    return params.routing<float>(s, epoch, params.weights_offset);
  }
  __device__ bool agree() const { return all_agree(params, epoch); }
  // Shares of both GEMMs' tile orders, for teams without one of `items` that place rows.
  __device__ int num_orders(int items) const {
    return up.work_tiles == nullptr ? 0 : 2 * max(2, (kTeams - items) / 2);
  }
  __device__ void order(const PlannedTiles& tiles, const PlanTeam& team, PlacedRun* placed, int i,
                        int count) const {
    const TileOrderParams& gemm = i % 2 == 0 ? up : down;
    write_tile_order(gemm, tiles, team, i / 2, count / 2, placed);
  }
};

}  // namespace

// wait_for_previous_kernel().
extern "C" __constant__ const int begins_early = 1;

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    plan_small(const __grid_constant__ PlanParams out, const __grid_constant__ SharedTables at) {
  extern __shared__ uint4 shared[];
  wait_for_previous_kernel();
  make_small_plan(out, at, reinterpret_cast<char*>(shared), PlanAlone{out});
}

// Sets params.state->ok, as `prepare` does. One block has too few threads for the padding rows of a
// training forward: `pad` zeroes them.
extern "C" __global__ void __launch_bounds__(kThreads, 1)
    prepare_small(const __grid_constant__ ExchangeParams params,
                  const __grid_constant__ PlanParams out, const __grid_constant__ SharedTables at,
                  const __grid_constant__ TileOrderParams up,
                  const __grid_constant__ TileOrderParams down,
                  const __grid_constant__ EmulatedLink link) {
  extern __shared__ uint4 shared[];
  wait_for_previous_kernel();
  // Volatile: the compiler leaves this load before the branch, where it overlaps with the status's.
  const u64 epoch = static_cast<const volatile ControlBlock&>(params.world.own()).epoch;
  if (params.state->status != kActive) return;
  const PlanOfCall call{params, epoch, up, down, link};
  const bool planned = make_small_plan(out, at, reinterpret_cast<char*>(shared), call);
  if (planned && threadIdx.x == 0) params.state->ok = 1;
}

// Behind `prepare_small`: zeroes the padding rows of a training forward. Any grid.
extern "C" __global__ void __launch_bounds__(kTokenTile)
    pad(const __grid_constant__ ExchangeParams params) {
  wait_for_previous_kernel();
  let_next_kernel_begin();
  if (!params.state->ok) return;
  const int warp = blockIdx.x * kWarps + threadIdx.x / 32;
  zero_padding_rows(params, params.rows, BLOCK_K, warp, gridDim.x * kWarps);
}
