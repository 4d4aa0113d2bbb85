// The device planner: the tables of cometrt/plan/reference.py, bit for bit, in one launch and
// without a host synchronisation. Read the phases in order; each says what it adds. `prepare` is
// all of a forward that comes before layer0: it also waits for all ranks, takes their routing, and
// orders both GEMMs' tiles.
//
// Few threads wait for one load after the other here, so what matters is how many loads follow from
// each other and how often the grid meets. What one phase needs of an item is loaded together; a
// phase begins where another's items do not depend on it; weights cross while tiles are made.
//
// A segment (c, s, p) is the rows of source s in the p-th tile of rank c's layer0 order. Rows of
// one expert and source lie in token order, so a segment is a stretch of the sorted pairs of
// (s, expert), and every rank can find the segments of every other from pair counts alone. It needs
// those where it is c itself, whose pairs lie sorted in row_pair, and those where it is s.
#include "comm/pacing.cuh"
#include "exchange/agree.cuh"
#include "exchange/pads.cuh"
#include "plan/plan.cuh"
#include "schedule/turns.cuh"

using namespace cometrt;

namespace {

constexpr int kChunk = 128;  // tokens, and threads of a block
constexpr int kWarps = kChunk / 32;
constexpr u32 kNever = 0xffffffffu;
constexpr int kPairsAtOnce = 8, kRowsAtOnce = 4;

__device__ int num_chunks(const PlanParams& p) { return (p.g.max_tokens + kChunk - 1) / kChunk; }

// A token's ids from k on, as many as there are, in one go: in vectors where they are aligned.
__device__ void load_ids(const int* ids, int k, int topk, int (&out)[kPairsAtOnce]) {
#pragma unroll
  for (int i = 0; i < kPairsAtOnce; i += 4) {
    if (topk % 4 == 0) {
      int4 four = make_int4(-1, -1, -1, -1);
      if (k + i < topk) four = *reinterpret_cast<const int4*>(ids + k + i);
      out[i] = four.x, out[i + 1] = four.y, out[i + 2] = four.z, out[i + 3] = four.w;
    } else {
#pragma unroll
      for (int j = i; j < i + 4; ++j) out[j] = k + j < topk ? ids[k + j] : -1;
    }
  }
}

// Which threads of the chunk chose an expert: 4 words each, in shared memory.
__device__ u32 choose(u32* members, int expert) {  // returns the word as it was
  return atomicOr(&members[4 * expert + threadIdx.x / 32], 1u << (threadIdx.x % 32));
}
__device__ int chosen_before(const u32* members, int expert) {
  const int warp = threadIdx.x / 32;
  int count = __popc(members[4 * expert + warp] & ((1u << (threadIdx.x % 32)) - 1));
#pragma unroll
  for (int w = 0; w < kWarps - 1; ++w) count += w < warp ? __popc(members[4 * expert + w]) : 0;
  return count;
}

// Where the tables of rank c have its rows of a local expert from the source at ring distance d;
// d = size: where the expert ends.
__device__ long long rank_rows_at(const PlanParams& p, int c, int d, int expert) {
  return (static_cast<long long>(c) * (p.g.size + 1) + d) * p.g.local_experts + expert;
}

// 0. What is counted up from the first chunk on is 0.
__device__ void clear_counts(const PlanParams& p) {
  const int first = blockIdx.x * kChunk + threadIdx.x, step = gridDim.x * kChunk;
  for (int i = first; i < p.g.size * p.g.num_experts; i += step) p.counts[i] = 0;
  for (int i = first; i < p.g.size * p.g.ep; i += step) p.token_counts[i] = 0;
  if (first == 0) *p.first_wrong_pair = ~0ull, *p.largest_need = 0;
}

// 1. Every table is -1, weights 0, and what later phases count up is 0.
__device__ void clear_tables(const PlanParams& p) {
  const long long first = static_cast<long long>(blockIdx.x) * kChunk + threadIdx.x;
  const long long step = static_cast<long long>(gridDim.x) * kChunk;
  int4* tables = reinterpret_cast<int4*>(p.tables);
  for (long long i = first; i < p.num_words / 4; i += step) tables[i] = make_int4(-1, -1, -1, -1);
  for (long long i = first; i < p.g.capacity; i += step) p.row_weight[i] = 0;
  for (long long i = first; i < 2 * p.g.size * p.g.max_tiles; i += step) p.segment_counts[i] = 0;
  for (long long i = first; i < p.g.size * p.g.blocks_per_home; i += step) p.block_position[i] = -1;
}

// The tokens of a source as this block knows them (-1: the world has stopped), its ids, and when
// those of a chunk will have crossed, which the first thread knows.
struct Routing {
  int tokens;
  const int* ids;
  u64 crossed_ns;
};

// Waits for the source and sends for the ids of a chunk of its tokens. Acquires source_ready.
__device__ Routing find_routing(const Call& c, const Pace& pace, const PlanParams& p, int chunk_idx,
                                int source) {
  __shared__ int shared_tokens;
  u64 crossed_ns = 0;
  if (threadIdx.x == 0) {
    const int tokens = shared_tokens = wait_source(c, source);
    if (chunk_idx == 0) p.num_tokens[source] = tokens;
    const int here = max(0, min(kChunk, tokens - chunk_idx * kChunk));
    if (source != c.world.rank) crossed_ns = reserve_link(pace, 4ull * here * p.g.topk);
  }
  __syncthreads();
  return {shared_tokens, c.routing<int>(source, c.world.epoch(), c.ids_at), crossed_ns};
}

// 1. Takes a chunk's ids into this rank's table and checks them; counts pairs by (source, chunk,
// expert) and (source, expert), and tokens by (source, group). `meanwhile()` runs while the ids are
// on their way. Blocks whose waits ended may know less of a source than others do: no tables are
// made of that. A block a (chunk, source).
template <typename Meanwhile>
__device__ void count_pairs(const PlanParams& p, int chunk_idx, int source, const Routing& routing,
                            u32* members, Meanwhile meanwhile) {
  const int thread = threadIdx.x, lane = thread % 32, topk = p.g.topk;
  for (int i = thread; i < 4 * p.g.num_experts; i += kChunk) members[i] = 0;
  const int token = chunk_idx * kChunk + thread;
  const bool used = token < routing.tokens;
  const int* from = routing.ids + static_cast<long long>(token) * topk;
  const long long first_pair = (static_cast<long long>(source) * p.g.max_tokens + token) * topk;
  u64 groups = 0;
  for (int k = 0; k < topk; k += kPairsAtOnce) {
    int ids[kPairsAtOnce];
    if (used) load_ids(from, k, topk, ids);
    if (k == 0) {
      meanwhile();
      if (thread == 0) wait_crossed(routing.crossed_ns);
      __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < kPairsAtOnce; ++i) {
      if (!used || k + i >= topk) continue;
      p.ids[first_pair + k + i] = ids[i];
      bool wrong = ids[i] < -1 || ids[i] >= p.g.num_experts;
      if (ids[i] >= 0 && !wrong) {
        wrong = choose(members, ids[i]) >> lane & 1;  // chosen before
        groups |= 1ull << (ids[i] / p.g.local_experts);
      }
      if (wrong) atomicMin(p.first_wrong_pair, static_cast<u64>(first_pair + k + i));
    }
  }
  for (int first = 0; first < p.g.ep; first += 32) {  // a lane sums a group
    int count = 0;
    for (int group = first; group < min(first + 32, p.g.ep); ++group) {
      const u32 with = __ballot_sync(~0u, groups >> group & 1);
      if (group % 32 == lane) count = __popc(with);
    }
    if (count) atomicAdd(&p.token_counts[source * p.g.ep + first + lane], count);
  }
  if (routing.tokens < 0 && thread == 0) *p.largest_need = ~0ull;
  __syncthreads();
  int* counts = p.chunk_counts +
                (static_cast<long long>(source) * num_chunks(p) + chunk_idx) * p.g.num_experts;
  for (int e = thread; e < p.g.num_experts; e += kChunk) {
    const uint4 mask = reinterpret_cast<const uint4*>(members)[e];
    const int count = __popc(mask.x) + __popc(mask.y) + __popc(mask.z) + __popc(mask.w);
    counts[e] = count;
    if (count) atomicAdd(&p.counts[source * p.g.num_experts + e], count);
  }
}

// 2. A chunk's weights, from the source's table into this rank's, checked. The first thread returns
// when they will have crossed. A block a (chunk, source).
__device__ u64 take_weights(const PlanParams& p, int chunk_idx, int source, const float* from,
                            const Pace* pace) {
  const int tokens = p.num_tokens[source], topk = p.g.topk;
  const int begin = chunk_idx * kChunk * topk, end = min(tokens, (chunk_idx + 1) * kChunk) * topk;
  const long long to = static_cast<long long>(source) * p.g.max_tokens * topk;
  u64 crossed_ns = 0;
  if (pace != nullptr && threadIdx.x == 0 && begin < end && source != p.g.rank) {
    crossed_ns = reserve_link(*pace, 4ull * (end - begin));
  }
  for (int first = begin + threadIdx.x; first < end; first += kPairsAtOnce * kChunk) {
    float weights[kPairsAtOnce];
#pragma unroll
    for (int i = 0; i < kPairsAtOnce; ++i) {
      weights[i] = first + i * kChunk < end ? from[first + i * kChunk] : 0;
    }
#pragma unroll
    for (int i = 0; i < kPairsAtOnce; ++i) {
      const int pair = first + i * kChunk;
      if (pair >= end) continue;
      p.weights[to + pair] = weights[i];
      if (!isfinite(weights[i])) atomicMin(p.first_wrong_pair, static_cast<u64>(to + pair));
    }
  }
  return crossed_ns;
}

// Rows of a rank's experts, from pair counts. Tables in shared memory.
struct RankTiles {
  const Geometry& g;
  int* before;      // [size + 1, local_experts] rows from sources nearer than d
  int* position;    // [waves, local_experts] place in layer0's order of the first tile
  int* first_tile;  // [local_experts]

  __device__ RankTiles(const Geometry& geometry, int* shared) : g(geometry), before(shared) {
    position = before + (g.size + 1) * g.local_experts;
    first_tile = position + g.waves * g.local_experts;
  }
  __device__ int rows(int expert) const { return before[g.size * g.local_experts + expert]; }
  // Tiles of the expert whose rows all come from sources at most d away.
  __device__ int tiles_within(int d, int expert) const {
    const int end = before[(d + 1) * g.local_experts + expert], all = rows(expert);
    return end == all ? (all + g.block_m - 1) / g.block_m : end / g.block_m;
  }
  __device__ int tile_distance(int expert, int index) const {
    const int end = min((index + 1) * g.block_m, rows(expert));
    int d = 0;
    while (before[(d + 1) * g.local_experts + expert] < end) ++d;
    return d;
  }
  // Tiles of the expert in waves up to that one; -1: none.
  __device__ int tiles_upto_wave(int wave, int expert) const {
    return wave < 0 ? 0 : tiles_within(last_distance(g, wave), expert);
  }
  // Place in layer0's order of the index-th tile of the expert, at that distance.
  __device__ int place(int expert, int index, int d) const {
    int wave = 0;
    while (last_distance(g, wave) < d) ++wave;
    return position[wave * g.local_experts + expert] + index - tiles_upto_wave(wave - 1, expert);
  }
};

// 2. The tiles of every rank, a block each; this rank's also writes its tables.
__device__ void make_tiles(const PlanParams& p, int c, int* shared, int* warps) {
  const RankTiles tiles(p.g, shared);
  const int experts = p.g.local_experts, size = p.g.size, thread = threadIdx.x;
  const int first_expert = c / p.g.tp * experts;
  for (int i = thread; i < size * experts; i += kChunk) {
    const int source = (c + i / experts) % size;
    tiles.before[experts + i] = p.counts[source * p.g.num_experts + first_expert + i % experts];
  }
  __syncthreads();
  for (int e = thread; e < experts; e += kChunk) {
    int sum = tiles.before[e] = 0;
    for (int d = 1; d <= size; ++d) {
      sum += tiles.before[d * experts + e];
      tiles.before[d * experts + e] = sum;
    }
  }
  __syncthreads();
  int num_tiles = 0;  // places by (wave, expert)
  for (int first = 0; first < p.g.waves * experts; first += kChunk) {
    const int i = first + thread, wave = i / experts, e = i % experts;
    const bool valid = i < p.g.waves * experts;
    const int count =
        valid ? tiles.tiles_upto_wave(wave, e) - tiles.tiles_upto_wave(wave - 1, e) : 0;
    int total;
    const int before = block_scan(count, warps, &total);
    if (valid) tiles.position[i] = num_tiles + before;
    num_tiles += total;
  }
  int first_tile = 0;  // by expert
  for (int first = 0; first < experts; first += kChunk) {
    const int e = first + thread;
    const int count = e < experts ? tiles.tiles_within(size - 1, e) : 0;
    int total;
    const int before = block_scan(count, warps, &total);
    if (e < experts) tiles.first_tile[e] = first_tile + before;
    first_tile += total;
  }
  if (thread == 0) {
    p.rank_num_tiles[c] = num_tiles;
    const u64 need = static_cast<u64>(num_tiles) * p.g.block_m;
    if (need > static_cast<u64>(p.g.capacity)) {  // the largest need, of the lowest rank
      atomicMax(p.largest_need, need << 16 | static_cast<u64>(0xffff - c));
    }
  }
  __syncthreads();
  if (num_tiles > p.g.max_tiles) return;
  const bool mine = c == p.g.rank;
  for (int i = thread; i < (size + 1) * experts; i += kChunk) {
    const int row = tiles.first_tile[i % experts] * p.g.block_m + tiles.before[i];
    p.rank_rows[rank_rows_at(p, c, 0, i)] = row;
  }
  const long long first_of_rank = static_cast<long long>(c) * p.g.max_tiles;
  for (int e = thread / 32; e < experts; e += kWarps) {  // a warp each
    for (int index = thread % 32; index < tiles.tiles_within(size - 1, e); index += 32) {
      const int d = tiles.tile_distance(e, index), position = tiles.place(e, index, d);
      const int tile = tiles.first_tile[e] + index;
      p.rank_order[first_of_rank + position] = tile * experts + e;
      p.rank_tile_position[first_of_rank + tile] = position;
      if (!mine) continue;
      p.tile_expert[tile] = e;
      p.tile_distance[tile] = d;
      p.tile_order[position] = tile;
    }
  }
  if (!mine) return;
  for (int e = thread; e < experts; e += kChunk) {
    p.expert_offsets[e] = tiles.first_tile[e] * p.g.block_m;
    p.expert_rows[e] = tiles.rows(e);
  }
  if (thread == 0) {
    p.expert_offsets[experts] = num_tiles * p.g.block_m;
    p.out_num_tiles[0] = num_tiles;
  }
}

// 2. Slots, sends and own lists begin where counts say. One block.
__device__ void make_bases(const PlanParams& p, int* tokens, int* warps) {
  const int size = p.g.size, ep = p.g.ep, tp = p.g.tp, rank = p.g.rank, thread = threadIdx.x;
  for (int i = thread; i < size * ep; i += kChunk) tokens[i] = p.token_counts[i];
  for (int s = thread; s < size; s += kChunk) p.out_num_tokens[s] = p.num_tokens[s];
  __syncthreads();
  // Slots: contributors packed by ring distance from the home, whose own sum is not staged.
  for (int home = thread; home < size; home += kChunk) {
    int base = 0;
    if (home == rank) p.send_base[home] = p.home_base[0] = 0;
    for (int d = 1; d < size; ++d) {
      const int c = (home + d) % size;
      if (c == rank) p.send_base[home] = base;
      if (home == rank) p.home_base[d] = base;
      base += tokens[home * ep + c / tp];
    }
  }
  if (thread == 0) {
    int sends = 0, blocks = 0;
    for (int home = 0; home < size; ++home) {
      p.send_offsets[home] = sends;
      if (home == rank) continue;
      const int count = tokens[home * ep + rank / tp];
      sends += count;
      blocks += (count + p.g.block_tokens - 1) / p.g.block_tokens;
    }
    p.send_offsets[size] = sends;
    p.num_blocks[0] = blocks;
  }
  int start = 0;
  for (int first = 0; first < p.g.num_experts; first += kChunk) {
    const int e = first + thread;
    const int count = e < p.g.num_experts ? p.counts[rank * p.g.num_experts + e] : 0;
    int total;
    const int before = block_scan(count, warps, &total);
    if (e < p.g.num_experts) p.list_start[e] = start + before;
    start += total;
  }
}

// 2. Sums a column of chunk counts up, in place. Columns: this source's experts, then the local
// experts of all sources. A warp each.
__device__ void sum_chunks(const PlanParams& p, int column) {
  const int experts = p.g.num_experts, chunks = num_chunks(p), lane = threadIdx.x % 32;
  int source = p.g.rank, expert = column;
  if (column >= experts) {
    source = (column - experts) / p.g.local_experts;
    expert = p.g.rank / p.g.tp * p.g.local_experts + (column - experts) % p.g.local_experts;
    if (source == p.g.rank || source >= p.g.size) return;
  }
  int* counts = p.chunk_counts + static_cast<long long>(source) * chunks * experts + expert;
  int before = 0;
  for (int first = 0; first < chunks; first += 32) {
    const int chunk = first + lane;
    const int count = chunk < chunks ? counts[static_cast<long long>(chunk) * experts] : 0;
    int sum = count;
    for (int step = 1; step < 32; step *= 2) {
      const int left = __shfl_up_sync(~0u, sum, step);
      if (lane >= step) sum += left;
    }
    if (chunk < chunks) counts[static_cast<long long>(chunk) * experts] = before + sum - count;
    before += __shfl_sync(~0u, sum, 31);
  }
}

// 3. The rows of this rank and, of this source, the sorted tokens of each expert; the first tile
// that needs each token: on this rank of all sources, and of this source on all ranks; how many
// tokens each segment is the first of. A block a (chunk, source).
__device__ void place_rows(const PlanParams& p, int chunk_idx, int source, u32* members) {
  const int experts = p.g.local_experts, num_experts = p.g.num_experts, topk = p.g.topk;
  const int tp = p.g.tp, size = p.g.size, rank = p.g.rank, thread = threadIdx.x;
  const bool own = source == rank;
  // Pairs of a source elsewhere matter only where their expert is here.
  const int begin = own ? 0 : rank / tp * experts, end = own ? num_experts : begin + experts;
  const int first_shard = own ? 0 : rank % tp, end_shard = own ? tp : first_shard + 1;
  // Of the chunk's first pair of each expert: its place in the list, its row on each shard.
  int* starts = reinterpret_cast<int*>(members + 4 * num_experts);  // [num_experts]
  int* rows = starts + num_experts;                                 // [tp, num_experts]
  u32* firsts = reinterpret_cast<u32*>(rows + tp * num_experts);    // [size, kChunk]
  const int* chunk =
      p.chunk_counts + (static_cast<long long>(source) * num_chunks(p) + chunk_idx) * num_experts;
  for (int e = begin + thread; e < end; e += kChunk) {
    reinterpret_cast<uint4*>(members)[e] = make_uint4(0, 0, 0, 0);
    starts[e] = p.list_start[e] + chunk[e];
    for (int shard = first_shard; shard < end_shard; ++shard) {
      const int c = e / experts * tp + shard, d = ring_distance(p.g, c, source);
      rows[shard * num_experts + e] = p.rank_rows[rank_rows_at(p, c, d, e % experts)] + chunk[e];
    }
  }
  for (int c = own ? 0 : rank; c < (own ? size : rank + 1); ++c)
    firsts[c * kChunk + thread] = kNever;
  const int token = chunk_idx * kChunk + thread;
  const bool used = token < p.num_tokens[source];
  const long long global_token = static_cast<long long>(source) * p.g.max_tokens + token;
  const long long first_pair = global_token * topk;
  int ids[kPairsAtOnce];
  __syncthreads();
  for (int k = 0; k < topk && used; k += kPairsAtOnce) {
    load_ids(p.ids + first_pair, k, topk, ids);
#pragma unroll
    for (int i = 0; i < kPairsAtOnce; ++i) {
      if (ids[i] >= begin && ids[i] < end) choose(members, ids[i]);
    }
  }
  __syncthreads();
  for (int k = 0; k < topk && used; k += kPairsAtOnce) {
    load_ids(p.ids + first_pair, k, topk, ids);
    int indices[kPairsAtOnce];
#pragma unroll
    for (int i = 0; i < kPairsAtOnce; ++i) {
      const bool matters = ids[i] >= begin && ids[i] < end;
      indices[i] = matters ? chosen_before(members, ids[i]) : -1;
    }
    for (int shard = first_shard; shard < end_shard; ++shard) {
      u32 positions[kPairsAtOnce];  // loads together, before the stores
#pragma unroll
      for (int i = 0; i < kPairsAtOnce; ++i) {
        if (indices[i] < 0) continue;
        const int c = ids[i] / experts * tp + shard;
        const int tile = (rows[shard * num_experts + ids[i]] + indices[i]) / p.g.block_m;
        positions[i] = p.rank_tile_position[static_cast<long long>(c) * p.g.max_tiles + tile];
      }
#pragma unroll
      for (int i = 0; i < kPairsAtOnce; ++i) {
        if (indices[i] < 0) continue;
        u32* first = &firsts[(ids[i] / experts * tp + shard) * kChunk + thread];
        *first = min(*first, positions[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < kPairsAtOnce; ++i) {
      if (indices[i] < 0) continue;
      const long long pair = first_pair + k + i;
      if (own) p.pair_list[starts[ids[i]] + indices[i]] = token;
      if (ids[i] / experts != rank / tp) continue;
      const int row = rows[rank % tp * num_experts + ids[i]] + indices[i];
      p.pair_row[pair] = row;
      p.row_pair[row] = static_cast<int>(pair);
      p.row_weight[row] = p.weights[pair];
    }
  }
  if (!used) return;
  const auto keep = [&](int j, long long at, int c) {
    const u32 first = firsts[c * kChunk + thread];
    p.first_position[at] = first;
    if (first != kNever) atomicAdd(&p.segment_counts[j * p.g.max_tiles + first], 1);
  };
  keep(source, global_token, rank);
  for (int c = 0; c < size && own; ++c) {
    keep(size + c, static_cast<long long>(size + c) * p.g.max_tokens + token, c);
  }
}

// 4. Sums along the orders: pulls forwards over all sources, sends and slots backwards for each
// home. A block a column; j = -1 for pulls. A thread sums neighbours.
__device__ void sum_segments(const PlanParams& p, int j, int* warps) {
  const int size = p.g.size, max_tiles = p.g.max_tiles;
  const int share = (max_tiles + kChunk - 1) / kChunk;
  const int begin = threadIdx.x * share, end = min(begin + share, max_tiles);
  const auto place = [&](int i) { return j < 0 ? i : max_tiles - 1 - i; };  // layer1 walks back
  const auto count = [&](int i) {
    if (j >= 0) return p.segment_counts[j * max_tiles + place(i)];
    int sum = 0;
#pragma unroll 8
    for (int s = 0; s < size; ++s) sum += p.segment_counts[s * max_tiles + i];
    return sum;
  };
  int mine = 0, total;
#pragma unroll 4
  for (int i = begin; i < end; ++i) mine += count(i);
  int sum = block_scan(mine, warps, &total);
  int* out = j < 0 ? p.pull_offsets : p.segment_before + j * max_tiles;
  for (int i = begin; i < end; ++i) {
    const int here = count(i);
    out[place(i)] = sum;
    sum += here;
  }
  if (threadIdx.x == 0) {
    if (j < 0) {
      p.pull_offsets[max_tiles] = total;
    } else {
      p.column_tokens[j] = total;
    }
  }
}

// 5. The place of a block among those that are pushed, by (when layer1 finishes them, distance of
// the home, block): how many are whole before, of nearer homes with this position.
__device__ int push_place(const PlanParams& p, int home, int block, int position) {
  int place = block;
  const int mine = ring_distance(p.g, p.g.rank, home);
#pragma unroll 4
  for (int d = 1; d < p.g.size; ++d) {
    const int other = (p.g.rank + d) % p.g.size, at = other * p.g.max_tiles + position;
    const int tokens = p.segment_before[at] + (d < mine ? p.segment_counts[at] : 0);
    const bool all = tokens == p.column_tokens[other];  // then the last need not be full
    const int whole = (tokens + (all ? p.g.block_tokens - 1 : 0)) / p.g.block_tokens;
    place += d == mine ? 0 : whole;
  }
  return place;
}

// 5. Pulls and sends of the tokens whose first tile this is, which lie in it by (distance, token).
// A warp a position.
__device__ void place_pulls(const PlanParams& p, int position) {
  const int lane = threadIdx.x % 32, max_tiles = p.g.max_tiles;
  if (position >= p.rank_num_tiles[p.g.rank]) return;
  const long long first_row = static_cast<long long>(p.tile_order[position]) * p.g.block_m;
  int pulls = p.pull_offsets[position];
  int last_source = -1, sent = 0;  // of the rows before: the last source, its tokens
  for (int first = 0; first < p.g.block_m; first += 32 * kRowsAtOnce) {
    int tokens[kRowsAtOnce];
    bool here[kRowsAtOnce];
#pragma unroll
    for (int i = 0; i < kRowsAtOnce; ++i) {
      const int row = first + 32 * i + lane;
      const int pair = row < p.g.block_m ? p.row_pair[first_row + row] : -1;
      tokens[i] = pair < 0 ? -1 : pair / p.g.topk;
    }
#pragma unroll
    for (int i = 0; i < kRowsAtOnce; ++i) {
      here[i] = tokens[i] >= 0 && p.first_position[tokens[i]] == static_cast<u32>(position);
    }
#pragma unroll
    for (int i = 0; i < kRowsAtOnce; ++i) {
      const u32 all = __ballot_sync(~0u, here[i]), left = all & ((1u << lane) - 1);
      if (all == 0) continue;
      const int s = here[i] ? tokens[i] / p.g.max_tokens : -1;
      const u32 same = __match_any_sync(~0u, s);
      const int index = __popc(same & left) + (s == last_source ? sent : 0);
      if (here[i]) {
        p.pull_tokens[pulls + __popc(left)] = tokens[i];
        if (s != p.g.rank) {
          const int at = p.segment_before[s * max_tiles + position] + index;
          p.send_tokens[p.send_offsets[s] + at] = tokens[i];
          const int block = at / p.g.block_tokens;
          if ((at + 1) % p.g.block_tokens == 0 || at + 1 == p.column_tokens[s]) {
            const int item = s * p.g.blocks_per_home + block;
            p.block_position[item] = position;
            p.push_blocks[push_place(p, s, block, position)] = item;
          }
        }
      }
      pulls += __popc(all);
      const int last = 31 - __clz(all);
      last_source = __shfl_sync(~0u, s, last);
      sent = __shfl_sync(~0u, index, last) + 1;
    }
  }
}

// 5. Slots of this home's tokens in the segments of rank c at 32 positions. A warp: a lane looks a
// segment up, then all work on those that are not empty.
__device__ void place_slots(const PlanParams& p, int c, int first_position) {
  const int lane = threadIdx.x % 32, max_tiles = p.g.max_tiles, mine = first_position + lane;
  const int experts = p.g.local_experts, back = ring_distance(p.g, p.g.rank, c);
  if (back == 0) return;                       // the home's own sum has no slot
  int begin_of = 0, end_of = 0, place_of = 0;  // of the lane's segment: in the list; first slot
  if (mine < p.rank_num_tiles[c]) {
    const int column = (p.g.size + c) * max_tiles + mine;
    const int packed = p.rank_order[static_cast<long long>(c) * max_tiles + mine];
    const int tokens = p.segment_counts[column];
    place_of = p.home_base[back] + p.segment_before[column];
    const int expert = packed % experts, tile = packed / experts;
    const long long rows = rank_rows_at(p, c, ring_distance(p.g, c, p.g.rank), expert);
    const int first = p.rank_rows[rows], end = p.rank_rows[rows + experts];
    const int start = p.list_start[c / p.g.tp * experts + expert] - first;
    begin_of = start + max(tile * p.g.block_m, first);
    end_of = tokens == 0 ? begin_of : start + min((tile + 1) * p.g.block_m, end);
  }
  const u32* needed = p.first_position + static_cast<long long>(p.g.size + c) * p.g.max_tokens;
  for (u32 segments = __ballot_sync(~0u, begin_of < end_of); segments; segments &= segments - 1) {
    const int which = __ffs(segments) - 1, position = first_position + which;
    const int begin = __shfl_sync(~0u, begin_of, which), end = __shfl_sync(~0u, end_of, which);
    int place = __shfl_sync(~0u, place_of, which);
    for (int first = begin; first < end; first += 32 * kRowsAtOnce) {
      int tokens[kRowsAtOnce];
      bool here[kRowsAtOnce];
#pragma unroll
      for (int i = 0; i < kRowsAtOnce; ++i) {
        const int at = first + 32 * i + lane;
        tokens[i] = at < end ? p.pair_list[at] : -1;
      }
#pragma unroll
      for (int i = 0; i < kRowsAtOnce; ++i) {
        here[i] = tokens[i] >= 0 && needed[tokens[i]] == static_cast<u32>(position);
      }
#pragma unroll
      for (int i = 0; i < kRowsAtOnce; ++i) {
        const u32 all = __ballot_sync(~0u, here[i]);
        const int slot = place + __popc(all & ((1u << lane) - 1));
        if (here[i]) p.home_slot[static_cast<long long>(tokens[i]) * p.g.size + back] = slot;
        place += __popc(all);
      }
    }
  }
}

// All blocks of the grid meet; they are all resident, and wait for nothing else. In between a block
// may do what needs none of the others.
__device__ void arrive(u32* arrivals) {
  __syncthreads();
  if (threadIdx.x == 0) add_release_gpu(arrivals, 1);
}
__device__ void await_all(u32* arrivals, u32* upto) {
  *upto += gridDim.x;
  if (threadIdx.x == 0) {
    while (load_acquire_gpu(arrivals) < *upto) {
    }
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
// weights and returns when they will have crossed; `verdict()`, by one thread, may take note of the
// errors that were found. Returns whether there are tables: those of a call that is wrong are not
// filled, and nothing reads them. Shared memory: shared_words of DevicePlanner.
template <typename Find, typename Take, typename Verdict>
__device__ bool make_plan(const PlanParams& p, u32* shared, int* warps, u32* upto, Find find,
                          Take take, Verdict verdict) {
  const int size = p.g.size, chunks = num_chunks(p), rank = p.g.rank;
  int* words = reinterpret_cast<int*>(shared);
  clear_counts(p);
  arrive(p.arrivals);
  bool is_clear = false;
  const auto clear = [&] {  // once, while the first ids come
    if (is_clear) return;
    clear_tables(p);
    await_all(p.arrivals, upto);
    is_clear = true;
  };
  by_block(chunks * size, [&](int i) {  // ranks read from each other evenly
    const int source = (rank + i) % size;
    count_pairs(p, i / size, source, find(i / size, source), shared, clear);
  });
  clear();
  meet(p.arrivals, upto);

  const int columns = p.g.num_experts + size * p.g.local_experts;
  const int before_takes = size + 1 + (columns + kWarps - 1) / kWarps;
  u64 crossed_ns = 0;
  by_block(before_takes + chunks * size, [&](int i) {
    if (i < size) {
      make_tiles(p, i, words, warps);
    } else if (i == size) {
      make_bases(p, words, warps);
    } else if (i < before_takes) {
      sum_chunks(p, (i - size - 1) * kWarps + threadIdx.x / 32);
    } else {
      const int item = i - before_takes;
      crossed_ns = max(crossed_ns, take(item / size, (rank + item) % size));
    }
  });
  wait_crossed(crossed_ns);
  meet(p.arrivals, upto);

  if (blockIdx.x == 0 && threadIdx.x == 0) verdict();
  if (*p.first_wrong_pair != kNoWrongPair || *p.largest_need != 0) return false;
  by_block(chunks * size, [&](int i) { place_rows(p, i / size, (rank + i) % size, shared); });
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
__device__ void leave(const PlanParams& p, u32 upto) {
  __syncthreads();
  if (threadIdx.x == 0 && atomicAdd(p.arrivals, 1) == upto + gridDim.x - 1) *p.arrivals = 0;
}

}  // namespace

// The plan alone, from tables that are there. Grids of both kernels: as many blocks as are
// resident.
extern "C" __global__ void __launch_bounds__(kChunk, 6) plan(const __grid_constant__ PlanParams p) {
  extern __shared__ uint4 shared[];
  __shared__ int warps[kWarps];
  u32 upto = 0;
  const long long pairs = static_cast<long long>(p.g.max_tokens) * p.g.topk;  // of a source
  const auto find = [&](int, int source) {
    return Routing{p.num_tokens[source], p.ids + source * pairs, 0};
  };
  const auto take = [&](int chunk, int source) {
    return take_weights(p, chunk, source, p.weights + source * pairs, nullptr);
  };
  make_plan(p, reinterpret_cast<u32*>(shared), warps, &upto, find, take, [] {});
  leave(p, upto);
}

// The plan of a forward, and what follows from it: the verdict, the turns of both GEMMs (their
// tables are the plan's), and pads of c.rows where layer0 fills them. The grid is even.
extern "C" __global__ void __launch_bounds__(kChunk, 6)
    prepare(const __grid_constant__ Call c, const __grid_constant__ PlanParams p,
            const __grid_constant__ TurnsParams up, const __grid_constant__ TurnsParams down,
            const __grid_constant__ Pace pace) {
  extern __shared__ uint4 shared[];
  __shared__ int warps[kWarps];
  u32 upto = 0;
  const auto find = [&](int chunk, int source) { return find_routing(c, pace, p, chunk, source); };
  const auto take = [&](int chunk, int source) {
    const float* weights = c.routing<float>(source, c.world.epoch(), c.weights_at);
    return take_weights(p, chunk, source, weights, &pace);
  };
  const auto verdict = [&] {
    const bool planned = *p.first_wrong_pair == kNoWrongPair && *p.largest_need == 0;
    c.state->ok = all_agree(c) && planned;
  };
  const bool planned =
      make_plan(p, reinterpret_cast<u32*>(shared), warps, &upto, find, take, verdict);
  // Turns need nothing that was made after the last meeting, and a verdict that was given before.
  const int half = gridDim.x / 2, block = blockIdx.x;
  if (up.items != nullptr) {
    const PlannedTiles tiles{p.tile_order,     p.out_num_tiles, p.tile_expert,
                             p.expert_offsets, p.expert_rows,   &c.state->ok};
    write_turns(block < half ? up : down, tiles, block % half, half, warps);
  }
  if (planned && c.tile_filled != nullptr) {
    zero_pad_rows(c, block * kChunk / 32 + threadIdx.x / 32, gridDim.x * kChunk / 32);
  }
  leave(p, upto);
}
