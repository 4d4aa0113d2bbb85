// The device planner: the tables of cometrt/plan/reference.py, bit for bit, in one launch and
// without a host synchronisation. Read the phases in order; each says what it adds. `prepare` is
// all of a forward that comes before layer0: it also waits for all ranks, takes their routing, and
// orders both GEMMs' tiles.
//
// A segment (c, s, p) is the rows of source s in the p-th tile of rank c's layer0 order. Rows of
// one expert and source lie in token order, so a segment is a stretch of the sorted pairs of
// (s, expert), and every rank can find the segments of every other from pair counts alone.
#include "comm/pacing.cuh"
#include "exchange/agree.cuh"
#include "exchange/pads.cuh"
#include "plan/plan.cuh"
#include "schedule/turns.cuh"

using namespace cometrt;

namespace {

constexpr int kChunk = 128;  // tokens, and threads of a block
constexpr u32 kNever = 0xffffffffu;
constexpr int kPairsAtOnce = 4;

__device__ int num_chunks(const PlanParams& p) { return (p.g.max_tokens + kChunk - 1) / kChunk; }

// What follows from pair counts for rank c. Tables [size, ...] of p.rank_*.
struct RankTiles {
  const PlanParams& p;
  int c, first_expert;

  __device__ RankTiles(const PlanParams& params, int rank)
      : p(params), c(rank), first_expert(rank / params.g.tp * params.g.local_experts) {}

  __device__ long long at(int d, int expert) const {
    return (static_cast<long long>(c) * p.g.size + d) * p.g.local_experts + expert;
  }
  // Rows of the expert from sources at most d away.
  __device__ int upto(int d, int expert) const { return p.rank_upto[at(d, expert)]; }
  __device__ int before(int d, int expert) const { return d ? upto(d - 1, expert) : 0; }
  __device__ int rows(int expert) const { return upto(p.g.size - 1, expert); }
  // Tiles of the expert whose rows all come from sources at most d away.
  __device__ int tiles_within(int d, int expert) const {
    const int end = upto(d, expert), all = rows(expert), m = p.g.block_m;
    return end == all ? (all + m - 1) / m : end / m;
  }
  __device__ int tile_distance(int expert, int index) const {
    int d = 0;
    while (tiles_within(d, expert) <= index) ++d;
    return d;
  }
  // Tiles of the expert in waves up to that one; -1: none.
  __device__ int tiles_upto_wave(int wave, int expert) const {
    return wave < 0 ? 0 : tiles_within(last_distance(p.g, wave), expert);
  }
  // Place in layer0's order of the index-th tile of the expert, at that distance.
  __device__ int position(int expert, int index, int d) const {
    int wave = 0;
    while (last_distance(p.g, wave) < d) ++wave;
    return p.rank_position[at(wave, expert)] + index - tiles_upto_wave(wave - 1, expert);
  }
  // The row of a pair within its expert.
  __device__ int row(int source, int expert, int pair_index) const {
    return before(ring_distance(p.g, c, source), expert) + pair_index;
  }
  // Place in layer0's order of the tile that holds a row of the expert.
  __device__ u32 position_of_row(int expert, int row) const {
    const int tile = p.rank_first_tile[c * p.g.local_experts + expert] + row / p.g.block_m;
    return p.rank_tile_position[static_cast<long long>(c) * p.g.max_tiles + tile];
  }
};

// The contributor and the home of column j: contributors' side first, homes' side after.
__device__ void column(const PlanParams& p, int j, int* c, int* s) {
  *c = j < p.g.size ? p.g.rank : j - p.g.size;
  *s = j < p.g.size ? j : p.g.rank;
}

// A segment as a stretch [begin, end) of the sorted pairs of (s, expert); returns false if empty.
__device__ bool segment(const PlanParams& p, int c, int s, int position, int* expert, int* begin,
                        int* end) {
  const RankTiles tiles(p, c);
  if (position >= p.rank_num_tiles[c]) return false;
  const int packed = p.rank_order[static_cast<long long>(c) * p.g.max_tiles + position];
  *expert = packed % p.g.local_experts;
  const int index = packed / p.g.local_experts, d = ring_distance(p.g, c, s);
  const int first = tiles.before(d, *expert), last = tiles.upto(d, *expert);
  *begin = max(index * p.g.block_m, first) - first;
  *end = min((index + 1) * p.g.block_m, last) - first;
  return *begin < *end;
}

__device__ long long pair_list_at(const PlanParams& p, int s, int c, int expert) {
  const int global_expert = c / p.g.tp * p.g.local_experts + expert;
  return static_cast<long long>(s) * p.g.max_tokens * p.g.topk +
         p.list_start[s * p.g.num_experts + global_expert];
}

// 0. Every table is -1, weights 0, and what later phases count up is 0.
__device__ void clear(const PlanParams& p) {
  const long long first = static_cast<long long>(blockIdx.x) * kChunk + threadIdx.x;
  const long long step = static_cast<long long>(gridDim.x) * kChunk;
  for (long long i = first; i < p.num_words; i += step) p.tables[i] = -1;
  for (long long i = first; i < p.g.capacity; i += step) p.row_weight[i] = 0;
  for (long long i = first; i < p.g.size * p.g.ep; i += step) p.token_counts[i] = 0;
  for (long long i = first; i < p.g.size * p.g.blocks_per_home; i += step) p.block_position[i] = -1;
  const long long tokens = static_cast<long long>(p.g.size) * p.g.max_tokens;
  for (long long i = first; i < tokens; i += step) p.first_position[tokens + i] = kNever;
  if (first == 0) *p.first_wrong_pair = ~0ull, *p.largest_need = 0;
}

// 1. The source's ids and weights of a chunk of tokens, from its heap into this rank's tables.
// Returns when they will have crossed. A block a (chunk, source). Acquires source_ready.
__device__ u64 take_routing(const Call& c, const Pace& pace, const PlanParams& p, int chunk_idx,
                            int source) {
  __shared__ int shared_tokens;
  const int first = chunk_idx * kChunk;
  u64 crossed_ns = 0;
  if (threadIdx.x == 0) {
    const int tokens = shared_tokens = wait_source(c, source);
    p.chunk_tokens[source * num_chunks(p) + chunk_idx] = tokens;
    if (chunk_idx == 0) p.num_tokens[source] = tokens;
    const int here = max(0, min(kChunk, tokens - first));
    if (source != c.world.rank) crossed_ns = reserve_link(pace, 8ull * here * p.g.topk);
  }
  __syncthreads();
  const int tokens = shared_tokens, all_pairs = p.g.max_tokens * p.g.topk;
  const long long to = 1ll * source * all_pairs;
  const int* ids = c.routing<int>(source, c.world.epoch(), c.ids_at);
  const float* weights = c.routing<float>(source, c.world.epoch(), c.weights_at);
  const int end = min(tokens, first + kChunk) * p.g.topk;
  for (int i = first * p.g.topk + threadIdx.x; i < end; i += kChunk) {
    p.ids[to + i] = ids[i];
    p.weights[to + i] = weights[i];
  }
  return crossed_ns;
}

// 2. Checks ids and weights; counts pairs by (source, chunk of tokens, expert); each pair's index
// among its chunk's pairs of its expert. Blocks whose waits ended may know less of a source than
// others do: no tables are made of that. A block a (chunk, source); members [num_experts, 4]: which
// tokens of the chunk chose it.
__device__ void count_pairs(const PlanParams& p, int chunk_idx, int source, u32* members) {
  const int thread = threadIdx.x, tokens = p.chunk_tokens[source * num_chunks(p) + chunk_idx];
  for (int i = thread; i < 4 * p.g.num_experts; i += kChunk) members[i] = 0;
  if (tokens < 0 && thread == 0) *p.largest_need = ~0ull;
  __syncthreads();
  const int token = chunk_idx * kChunk + thread;
  const long long first_pair = (static_cast<long long>(source) * p.g.max_tokens + token) * p.g.topk;
  const bool used = token < tokens;
  u64 groups = 0;
  for (int k = 0; k < p.g.topk && token < p.g.max_tokens; ++k) {
    const int id = used ? p.ids[first_pair + k] : -1;
    bool wrong = id < -1 || id >= p.g.num_experts;
    for (int j = 0; j < k && used; ++j) wrong |= id >= 0 && id == p.ids[first_pair + j];
    wrong |= used && !isfinite(p.weights[first_pair + k]);
    if (wrong) atomicMin(p.first_wrong_pair, static_cast<u64>(first_pair + k));
    const bool kept = id >= 0 && !wrong;
    p.pair_index[first_pair + k] = kept ? 0 : -1;
    if (!kept) continue;
    atomicOr(&members[4 * id + thread / 32], 1u << (thread % 32));
    groups |= 1ull << (id / p.g.local_experts);
  }
  for (int group = 0; group < p.g.ep; ++group) {
    const int count = __syncthreads_count(groups >> group & 1);
    if (thread == 0 && count) atomicAdd(&p.token_counts[source * p.g.ep + group], count);
  }
  __syncthreads();
  for (int k = 0; k < p.g.topk && used; ++k) {
    if (p.pair_index[first_pair + k] < 0) continue;
    const u32* mask = &members[4 * p.ids[first_pair + k]];
    int index = __popc(mask[thread / 32] & ((1u << (thread % 32)) - 1));
    for (int word = 0; word < thread / 32; ++word) index += __popc(mask[word]);
    p.pair_index[first_pair + k] = index;
  }
  int* counts = p.chunk_counts +
                (static_cast<long long>(source) * num_chunks(p) + chunk_idx) * p.g.num_experts;
  for (int e = thread; e < p.g.num_experts; e += kChunk) {
    const u32* mask = &members[4 * e];
    counts[e] = __popc(mask[0]) + __popc(mask[1]) + __popc(mask[2]) + __popc(mask[3]);
  }
}

// 3. Sums chunk counts up, in place; counts [size, num_experts] and where each (source, expert)
// starts in the source's sorted pairs. A block a source.
__device__ void sum_chunks(const PlanParams& p, int source, int* warps) {
  const int chunks = num_chunks(p);
  int* counts = p.chunk_counts + static_cast<long long>(source) * chunks * p.g.num_experts;
  int start = 0;
  for (int first = 0; first < p.g.num_experts; first += kChunk) {
    const int e = first + threadIdx.x;
    int sum = 0;
    if (e < p.g.num_experts) {
      for (int chunk = 0; chunk < chunks; chunk += 8) {
        int here[8];  // loads together, before the stores
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          here[i] = chunk + i < chunks ? counts[(chunk + i) * p.g.num_experts + e] : 0;
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          if (chunk + i < chunks) counts[(chunk + i) * p.g.num_experts + e] = sum;
          sum += here[i];
        }
      }
    }
    int total;
    const int before = block_scan(sum, warps, &total);
    if (e < p.g.num_experts) {
      p.counts[source * p.g.num_experts + e] = sum;
      p.list_start[source * p.g.num_experts + e] = start + before;
    }
    start += total;
  }
}

// 4. The tiles of every rank, a block each; this rank's also writes its tables.
__device__ void make_tiles(const PlanParams& p, int c, int* warps) {
  const RankTiles tiles(p, c);
  const int experts = p.g.local_experts;
  for (int e = threadIdx.x; e < experts; e += kChunk) {
    int sum = 0;
    for (int d = 0; d < p.g.size; ++d) {
      sum += p.counts[(c + d) % p.g.size * p.g.num_experts + tiles.first_expert + e];
      p.rank_upto[tiles.at(d, e)] = sum;
    }
  }
  __syncthreads();
  int start = 0;  // places by (wave, expert)
  for (int first = 0; first < p.g.waves * experts; first += kChunk) {
    const int i = first + threadIdx.x, wave = i / experts, e = i % experts;
    const bool valid = i < p.g.waves * experts;
    const int upto = valid ? tiles.tiles_upto_wave(wave, e) : 0;
    const int count = valid ? upto - tiles.tiles_upto_wave(wave - 1, e) : 0;
    int total;
    const int before = block_scan(count, warps, &total);
    if (valid) p.rank_position[tiles.at(wave, e)] = start + before;
    start += total;
  }
  const int num_tiles = start;
  int first_tile = 0;  // by expert
  for (int first = 0; first < experts; first += kChunk) {
    const int e = first + threadIdx.x;
    const int count = e < experts ? tiles.tiles_within(p.g.size - 1, e) : 0;
    int total;
    const int before = block_scan(count, warps, &total);
    if (e < experts) p.rank_first_tile[c * experts + e] = first_tile + before;
    first_tile += total;
  }
  if (threadIdx.x == 0) {
    p.rank_num_tiles[c] = num_tiles;
    const u64 need = static_cast<u64>(num_tiles) * p.g.block_m;
    if (need > static_cast<u64>(p.g.capacity)) {  // the largest need, of the lowest rank
      atomicMax(p.largest_need, need << 16 | static_cast<u64>(0xffff - c));
    }
  }
  __syncthreads();
  if (num_tiles > p.g.max_tiles) return;
  const bool mine = c == p.g.rank;
  const long long first_of_rank = static_cast<long long>(c) * p.g.max_tiles;
  for (int e = threadIdx.x / 32; e < experts; e += kChunk / 32) {  // a warp each
    for (int index = threadIdx.x % 32; index < tiles.tiles_within(p.g.size - 1, e); index += 32) {
      const int d = tiles.tile_distance(e, index);
      const int position = tiles.position(e, index, d);
      const int tile = p.rank_first_tile[c * experts + e] + index;
      p.rank_order[first_of_rank + position] = index * experts + e;
      p.rank_tile_position[first_of_rank + tile] = position;
      if (!mine) continue;
      p.tile_expert[tile] = e;
      p.tile_distance[tile] = d;
      p.tile_order[position] = tile;
    }
  }
  if (!mine) return;
  for (int e = threadIdx.x; e < experts; e += kChunk) {
    p.expert_offsets[e] = p.rank_first_tile[c * experts + e] * p.g.block_m;
    p.expert_rows[e] = tiles.rows(e);
  }
  for (int s = threadIdx.x; s < p.g.size; s += kChunk) p.out_num_tokens[s] = p.num_tokens[s];
  if (threadIdx.x == 0) {
    p.expert_offsets[experts] = num_tiles * p.g.block_m;
    p.out_num_tiles[0] = num_tiles;
  }
}

// 5. Each pair's place among all pairs of its (source, expert), the sorted pairs, and the rows
// of this rank; the first tile that needs each token: on this rank of all sources, and of this
// source on all ranks. A block a (chunk, source).
__device__ void place_rows(const PlanParams& p, int chunk_idx, int source) {
  const int token = chunk_idx * kChunk + threadIdx.x;
  if (token >= p.num_tokens[source]) return;
  const RankTiles tiles(p, p.g.rank);
  const long long global_token = static_cast<long long>(source) * p.g.max_tokens + token;
  const int* chunk = p.chunk_counts +
                     (static_cast<long long>(source) * num_chunks(p) + chunk_idx) * p.g.num_experts;
  const int* starts = p.list_start + source * p.g.num_experts;
  int* list = p.pair_list + static_cast<long long>(source) * p.g.max_tokens * p.g.topk;
  u32 first = kNever;
  for (int k = 0; k < p.g.topk; k += kPairsAtOnce) {
    const long long pair = global_token * p.g.topk + k;
    int ids[kPairsAtOnce], indices[kPairsAtOnce];  // loads together, before the stores
#pragma unroll
    for (int i = 0; i < kPairsAtOnce; ++i) {
      indices[i] = k + i < p.g.topk ? p.pair_index[pair + i] : -1;
      ids[i] = indices[i] >= 0 ? p.ids[pair + i] : 0;
    }
#pragma unroll
    for (int i = 0; i < kPairsAtOnce; ++i) indices[i] += indices[i] >= 0 ? chunk[ids[i]] : 0;
#pragma unroll
    for (int i = 0; i < kPairsAtOnce; ++i) {
      if (indices[i] < 0) continue;
      p.pair_index[pair + i] = indices[i];
      list[starts[ids[i]] + indices[i]] = static_cast<int>(pair + i);
      const int e = ids[i] - tiles.first_expert;
      if (e < 0 || e >= p.g.local_experts) continue;
      const int own_row = tiles.row(source, e, indices[i]);
      const int row = p.rank_first_tile[p.g.rank * p.g.local_experts + e] * p.g.block_m + own_row;
      p.pair_row[pair + i] = row;
      p.row_pair[row] = static_cast<int>(pair + i);
      p.row_weight[row] = p.weights[pair + i];
      first = min(first, tiles.position_of_row(e, own_row));
    }
  }
  p.first_position[source * p.g.max_tokens + token] = first;
  if (source != p.g.rank) return;
  for (int k = 0; k < p.g.topk; ++k) {
    const long long pair = global_token * p.g.topk + k;
    if (p.pair_index[pair] < 0) continue;
    const int group = p.ids[pair] / p.g.local_experts;
    for (int c = group * p.g.tp; c < (group + 1) * p.g.tp; ++c) {
      const RankTiles there(p, c);
      const int e = p.ids[pair] - there.first_expert;
      const u32 position = there.position_of_row(e, there.row(source, e, p.pair_index[pair]));
      u32* least = &p.first_position[(p.g.size + c) * p.g.max_tokens + token];
      *least = min(*least, position);
    }
  }
}

// Whether a column's token, in the order of the source's tokens, is first needed at that position.
__device__ bool is_first(const PlanParams& p, int j, int s, int token, int position) {
  const int local = token - s * p.g.max_tokens;
  return p.first_position[j * p.g.max_tokens + local] == static_cast<u32>(position);
}

// 6. Tokens of each segment whose first tile it is: on this rank for all sources, and of this
// source on all ranks. A warp a (position, column).
__device__ void count_segments(const PlanParams& p, int position, int j) {
  const int lane = threadIdx.x % 32;
  int c, s, expert, begin, end, count = 0;
  column(p, j, &c, &s);
  if (segment(p, c, s, position, &expert, &begin, &end)) {
    const int* pairs = p.pair_list + pair_list_at(p, s, c, expert);
    for (int first = begin; first < end; first += 32) {
      const int i = first + lane;
      const bool here = i < end && is_first(p, j, s, pairs[i] / p.g.topk, position);
      count += __popc(__ballot_sync(~0u, here));
    }
  }
  if (lane == 0) p.segment_counts[j * p.g.max_tiles + position] = count;
}

// 7. Sums along the orders: pulls forwards over all sources, sends and slots backwards for each
// home. A block a column; j = -1 for pulls.
__device__ void sum_segments(const PlanParams& p, int j, int* warps) {
  const int size = p.g.size, max_tiles = p.g.max_tiles;
  int sum = 0;
  for (int first = 0; first < max_tiles; first += kChunk) {
    const int i = first + threadIdx.x;
    int count = 0;
    const int position = j < 0 ? i : max_tiles - 1 - i;  // layer1 walks backwards
    if (i < max_tiles) {
      if (j < 0) {
        for (int s = 0; s < size; ++s) count += p.segment_counts[s * max_tiles + position];
      } else {
        count = p.segment_counts[j * max_tiles + position];
      }
    }
    int total;
    const int before = block_scan(count, warps, &total);
    if (i < max_tiles) {
      int* out = j < 0 ? p.pull_offsets : p.segment_before + j * max_tiles;
      out[position] = sum + before;
    }
    sum += total;
  }
  if (threadIdx.x == 0) {
    if (j < 0) {
      p.pull_offsets[max_tiles] = sum;
    } else {
      p.column_tokens[j] = sum;
    }
  }
  if (j >= 0 || threadIdx.x != 0) return;
  // Slots: contributors packed by ring distance from the home, whose own sum is not staged.
  for (int home = 0; home < size; ++home) {
    int base = 0;
    for (int d = 1; d < size; ++d) {
      const int c = (home + d) % size;
      if (c == p.g.rank) p.send_base[home] = base;
      if (home == p.g.rank) p.home_base[d] = base;
      base += p.token_counts[home * p.g.ep + c / p.g.tp];
    }
  }
  p.send_base[p.g.rank] = 0;
  p.home_base[0] = 0;
  int sends = 0, blocks = 0;
  for (int home = 0; home < size; ++home) {
    p.send_offsets[home] = sends;
    if (home == p.g.rank) continue;
    const int tokens = p.token_counts[home * p.g.ep + p.g.rank / p.g.tp];
    sends += tokens;
    blocks += (tokens + p.g.block_tokens - 1) / p.g.block_tokens;
  }
  p.send_offsets[size] = sends;
  p.num_blocks[0] = blocks;
}

// 8. Puts each token of a segment in its place: pulls and sends of this rank, slots of this home.
// A warp a (position, column).
__device__ void place_tokens(const PlanParams& p, int position, int j) {
  const int max_tiles = p.g.max_tiles, lane = threadIdx.x % 32;
  int c, s, expert, begin, end;
  column(p, j, &c, &s);
  if (j >= p.g.size && c == p.g.rank) return;  // the home's own sum has no slot
  if (!segment(p, c, s, position, &expert, &begin, &end)) return;
  const int* pairs = p.pair_list + pair_list_at(p, s, c, expert);
  int pulls = 0;
  if (j < p.g.size) {
    pulls = p.pull_offsets[position];
    for (int d = 0; d < ring_distance(p.g, c, s); ++d) {
      pulls += p.segment_counts[(c + d) % p.g.size * max_tiles + position];
    }
  }
  int place = p.segment_before[j * max_tiles + position];  // in the send order of (c, s)
  for (int first = begin; first < end; first += 32) {
    const int i = first + lane;
    const int token = i < end ? pairs[i] / p.g.topk : 0;
    const bool here = i < end && is_first(p, j, s, token, position);
    const u32 all = __ballot_sync(~0u, here);
    const int before = __popc(all & ((1u << lane) - 1)), total = __popc(all);
    if (here) {
      const int at = place + before;
      if (j >= p.g.size) {
        const int d = ring_distance(p.g, p.g.rank, c);
        p.home_slot[(token - s * p.g.max_tokens) * p.g.size + d] = p.home_base[d] + at;
      } else {
        p.pull_tokens[pulls + before] = token;
        if (s != p.g.rank) {
          p.send_tokens[p.send_offsets[s] + at] = token;
          const int last = p.column_tokens[j] - 1, size = p.g.block_tokens;
          if (at % size == size - 1 || at == last) {
            p.block_position[s * p.g.blocks_per_home + at / size] = position;
          }
        }
      }
    }
    pulls += total;
    place += total;
  }
}

// 9. Orders the blocks by (when layer1 finishes them, distance of the home, block).
// A warp a possible block.
__device__ void order_pushes(const PlanParams& p, int item) {
  const int count = p.g.size * p.g.blocks_per_home;
  if (p.block_position[item] < 0) return;
  const auto key = [&](int i) {
    const int home = i / p.g.blocks_per_home, block = i % p.g.blocks_per_home;
    const u64 late = p.g.max_tiles - p.block_position[i];
    return late << 40 | static_cast<u64>(ring_distance(p.g, p.g.rank, home)) << 32 |
           static_cast<u64>(block);
  };
  const u64 mine = key(item);
  int place = 0;
  for (int i = threadIdx.x % 32; i < count; i += 32) {
    place += p.block_position[i] >= 0 && key(i) < mine;
  }
  place = __reduce_add_sync(~0u, place);
  if (threadIdx.x % 32 == 0) p.push_blocks[place] = item;
}

// All blocks of the grid meet; they are all resident, and wait for nothing else.
__device__ void meet(u32* arrivals, u32* upto) {
  __syncthreads();
  *upto += gridDim.x;
  if (threadIdx.x == 0) {
    add_release_gpu(arrivals, 1);
    while (load_acquire_gpu(arrivals) < *upto) {
    }
  }
  __syncthreads();
}

// f(i) for i in [0, count), a block each.
template <typename F>
__device__ void by_block(int count, F f) {
  for (int i = blockIdx.x; i < count; i += gridDim.x) {
    f(i);
    __syncthreads();  // shared memory is free again
  }
}

// Likewise, a warp each.
template <typename F>
__device__ void by_warp(int count, F f) {
  const int warps = kChunk / 32;
  for (int i = blockIdx.x * warps + threadIdx.x / 32; i < count; i += gridDim.x * warps) f(i);
}

// All phases up to the tables. `take(chunk, source)` brings ids and weights and chunk_tokens;
// `taken()`: they are there; `verdict()`, by one thread, may take note of the errors that were
// found. Returns whether there are tables: those of a call that is wrong are not filled, and
// nothing reads them.
template <typename Take, typename Taken, typename Verdict>
__device__ bool make_plan(const PlanParams& p, u32* members, int* warps, u32* upto, Take take,
                          Taken taken, Verdict verdict) {
  const int size = p.g.size, chunks = num_chunks(p), tiles = p.g.max_tiles;
  const auto each_chunk = [&](auto f) {  // ranks read from each other evenly
    by_block(chunks * size, [&](int i) { f(i / size, (p.g.rank + i) % size); });
  };
  each_chunk(take);
  clear(p);
  taken();
  meet(p.arrivals, upto);
  each_chunk([&](int chunk, int source) { count_pairs(p, chunk, source, members); });
  meet(p.arrivals, upto);
  by_block(size, [&](int i) { sum_chunks(p, i, warps); });
  meet(p.arrivals, upto);
  by_block(size, [&](int i) { make_tiles(p, i, warps); });
  meet(p.arrivals, upto);
  if (blockIdx.x == 0 && threadIdx.x == 0) verdict();
  if (*p.first_wrong_pair != kNoWrongPair || *p.largest_need != 0) return false;
  each_chunk([&](int chunk, int source) { place_rows(p, chunk, source); });
  meet(p.arrivals, upto);
  by_warp(tiles * 2 * size, [&](int i) { count_segments(p, i % tiles, i / tiles); });
  meet(p.arrivals, upto);
  by_block(1 + 2 * size, [&](int i) { sum_segments(p, i - 1, warps); });
  meet(p.arrivals, upto);
  by_warp(tiles * 2 * size, [&](int i) { place_tokens(p, i % tiles, i / tiles); });
  meet(p.arrivals, upto);
  by_warp(size * p.g.blocks_per_home, [&](int item) { order_pushes(p, item); });
  return true;
}

// The last block sets the meetings' counter back.
__device__ void leave(const PlanParams& p, u32 upto) {
  __syncthreads();
  if (threadIdx.x == 0 && atomicAdd(p.arrivals, 1) == upto + gridDim.x - 1) *p.arrivals = 0;
}

}  // namespace

// The plan alone, from tables that are there. Grids of both kernels: as many blocks as are
// resident. Dynamic shared memory: 16 bytes an expert.
extern "C" __global__ void __launch_bounds__(kChunk, 6) plan(const __grid_constant__ PlanParams p) {
  extern __shared__ u32 members[];
  __shared__ int warps[kChunk / 32];
  u32 upto = 0;
  const auto take = [&](int chunk, int source) {
    p.chunk_tokens[source * num_chunks(p) + chunk] = p.num_tokens[source];
  };
  make_plan(p, members, warps, &upto, take, [] {}, [] {});
  leave(p, upto);
}

// The plan of a forward, and what follows from it: the verdict, the turns of both GEMMs (their
// tables are the plan's), and pads of c.rows where layer0 fills them. The grid is even.
extern "C" __global__ void __launch_bounds__(kChunk, 6)
    prepare(const __grid_constant__ Call c, const __grid_constant__ PlanParams p,
            const __grid_constant__ TurnsParams up, const __grid_constant__ TurnsParams down,
            const __grid_constant__ Pace pace) {
  extern __shared__ u32 members[];
  __shared__ int warps[kChunk / 32];
  u32 upto = 0;
  u64 crossed_ns = 0;  // the last of what this block takes
  const auto take = [&](int chunk, int source) {
    crossed_ns = max(crossed_ns, take_routing(c, pace, p, chunk, source));
  };
  const auto taken = [&] { wait_crossed(crossed_ns); };
  const auto verdict = [&] {
    const bool planned = *p.first_wrong_pair == kNoWrongPair && *p.largest_need == 0;
    c.state->ok = all_agree(c) && planned;
  };
  const bool planned = make_plan(p, members, warps, &upto, take, taken, verdict);
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
