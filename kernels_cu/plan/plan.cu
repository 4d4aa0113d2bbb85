// The device planner: the tables of cometrt/plan/reference.py, bit for bit, in one launch and
// without a host synchronisation. Read the phases in order; each says what it adds. `prepare` is
// all of a forward that comes before layer0: it also waits for all ranks, takes their routing, and
// orders both GEMMs' tiles.
//
// Few threads wait for one load after the other here, so what matters is how many loads follow from
// each other and how often the grid meets. What an item needs is loaded together, what does not
// depend on each other shares a phase, and weights cross while tiles are made.
//
// A segment (c, s, p) is the rows of source s in the p-th tile of rank c's layer0 order. Rows of
// one expert and source lie in token order, so a segment is a stretch of the sorted pairs of
// (s, expert), and every rank can find the segments of every other from pair counts alone. It needs
// those where it is c itself, whose pairs lie sorted in row_pair, and those where it is s.
#include "exchange/pads.cuh"
#include "plan/counts.cuh"
#include "plan/places.cuh"
#include "plan/tiles.cuh"
#include "schedule/turns.cuh"

using namespace cometrt;

namespace {

constexpr int kBlocksPerSm = 7;  // as many as get by without spills

// All blocks of the grid meet: they are all resident. Between its arrival and the others' a block
// may do what needs none of them. `upto`, in shared memory: arrivals that the next meeting needs,
// for the first thread.
__device__ void arrive(u32* arrivals) {
  __syncthreads();
  if (threadIdx.x == 0) add_release_gpu(arrivals, 1);
}
__device__ void await_all(u32* arrivals, u32* upto) {
  if (threadIdx.x == 0) {
    while (load_acquire_gpu(arrivals) < *upto) {
    }
    *upto += gridDim.x;
  }
  __syncthreads();
}
__device__ void meet(u32* arrivals, u32* upto) {
  arrive(arrivals);
  await_all(arrivals, upto);
}

// f(i) for i in [0, count), a block each.
template <typename F>
__device__ void by_block(int count, F f) {
  for (int i = blockIdx.x; i < count; i += gridDim.x) {
    f(i);
    __syncthreads();  // shared memory is free again
  }
}

// Likewise, a warp each: neighbours in different blocks.
template <typename F>
__device__ void by_warp(int count, F f) {
  for (int i = threadIdx.x / 32 * gridDim.x + blockIdx.x; i < count; i += gridDim.x * kWarps) f(i);
}

// All phases up to the tables. `find(chunk, source)`: see Routing; `take(chunk, source)` brings
// weights and returns when they will have crossed; `agree()`, by one thread: do all ranks call the
// same? Returns whether there are tables, and sets *ok then, which was 0: those of a call that is
// wrong are not filled, and nothing reads them. Shared memory: _shared_words of
// cometrt/cuda/planner.py.
template <typename Find, typename Take, typename Agree>
__device__ bool make_plan(const PlanParams& p, u32* shared, int* warps, u32* upto, Find find,
                          Take take, Agree agree, u32* ok) {
  const int size = p.g.size, chunks = num_chunks(p), rank = p.g.rank;
  int* words = reinterpret_cast<int*>(shared);
  if (threadIdx.x == 0) *upto = gridDim.x;
  clear_counts(p);
  arrive(p.arrivals);
  const auto clear = [&] {
    clear_tables(p);
    await_all(p.arrivals, upto);
  };
  by_block(chunks * size, [&](int i) {  // ranks read from each other evenly
    const int source = (rank + i) % size;
    const auto meanwhile = [&] {  // while this block's first ids come
      if (i == blockIdx.x) clear();
    };
    count_pairs(p, i / size, source, find(i / size, source), shared, meanwhile);
  });
  if (blockIdx.x >= chunks * size) clear();
  meet(p.arrivals, upto);

  const int columns = p.g.num_experts + size * p.g.local_experts;
  const int before_takes = size + 1 + (columns + kWarps - 1) / kWarps;
  u64 crossed_ns = 0;
  by_block(before_takes + chunks * size, [&](int i) {
    if (i < size) {
      make_tiles(p, i, words, warps);
    } else if (i == size) {
      make_bases(p, words, warps);
      if (threadIdx.x == 0 && !agree()) atomicMax(p.largest_need, ~0ull);
    } else if (i < before_takes) {
      sum_chunks(p, (i - size - 1) * kWarps + threadIdx.x / 32);
    } else {
      const int item = i - before_takes;
      crossed_ns = max(crossed_ns, take(item / size, (rank + item) % size));
    }
  });
  wait_crossed(crossed_ns);
  meet(p.arrivals, upto);

  if (*p.first_wrong_pair != kNoWrongPair || *p.largest_need != 0) return false;
  if (ok != nullptr && blockIdx.x == 0 && threadIdx.x == 0) *ok = 1;
  by_block(chunks * size, [&](int i) {  // own chunks take longest: first, and one a block
    place_rows(p, i % chunks, (rank + i / chunks) % size, shared);
  });
  meet(p.arrivals, upto);

  by_block(1 + 2 * size, [&](int i) { sum_segments(p, i - 1, warps); });
  meet(p.arrivals, upto);

  const int groups = (p.g.max_tiles + 31) / 32;  // of positions
  by_warp(size * groups + p.g.max_tiles, [&](int i) {
    if (i < size * groups) {
      place_slots(p, i % size, i / size * 32);
    } else {
      place_pulls(p, i - size * groups);
    }
  });
  return true;
}

// The last block sets the meetings' counter back.
__device__ void leave(const PlanParams& p, const u32* upto) {
  __syncthreads();
  if (threadIdx.x == 0 && atomicAdd(p.arrivals, 1) == *upto - 1) *p.arrivals = 0;
}

}  // namespace

// The plan alone, from tables that are there. Grids of both kernels: as many blocks as are
// resident.
extern "C" __global__ void __launch_bounds__(kChunk, kBlocksPerSm)
    plan(const __grid_constant__ PlanParams p) {
  extern __shared__ uint4 shared[];
  __shared__ int warps[kWarps];
  __shared__ u32 upto;
  const long long pairs = static_cast<long long>(p.g.max_tokens) * p.g.topk;  // of a source
  const auto find = [&](int, int source) {
    return Routing{p.num_tokens[source], p.ids + source * pairs, 0};
  };
  const auto take = [&](int chunk, int source) {
    return take_weights(p, chunk, source, p.weights + source * pairs, nullptr);
  };
  make_plan(
      p, reinterpret_cast<u32*>(shared), warps, &upto, find, take, [] { return true; }, nullptr);
  leave(p, &upto);
}

// The plan of a forward, and what follows from it: the verdict, the turns of both GEMMs (their
// tables are the plan's), and pads of c.rows where layer0 fills them. The grid is even.
extern "C" __global__ void __launch_bounds__(kChunk, kBlocksPerSm)
    prepare(const __grid_constant__ Call c, const __grid_constant__ PlanParams p,
            const __grid_constant__ TurnsParams up, const __grid_constant__ TurnsParams down,
            const __grid_constant__ Pace pace) {
  extern __shared__ uint4 shared[];
  __shared__ int warps[kWarps];
  __shared__ u32 upto;
  const auto find = [&](int chunk, int source) { return find_routing(c, pace, p, chunk, source); };
  const auto take = [&](int chunk, int source) {
    const float* weights = c.routing<float>(source, c.world.epoch(), c.weights_at);
    return take_weights(p, chunk, source, weights, &pace);
  };
  const auto agree = [&] { return all_agree(c); };
  const bool planned =
      make_plan(p, reinterpret_cast<u32*>(shared), warps, &upto, find, take, agree, &c.state->ok);
  leave(p, &upto);
  // Pads need the rows, turns the tiles and the verdict: all made before the last meeting.
  const int half = gridDim.x / 2, block = blockIdx.x;
  if (planned && c.tile_filled != nullptr) {
    zero_pad_rows(c, block * kWarps + threadIdx.x / 32, gridDim.x * kWarps);
  }
  if (up.items == nullptr) return;
  const PlannedTiles tiles{p.tile_order,     p.out_num_tiles, p.tile_expert,
                           p.expert_offsets, p.expert_rows,   &c.state->ok};
  write_turns(block < half ? up : down, tiles, block % half, half, warps);
}
