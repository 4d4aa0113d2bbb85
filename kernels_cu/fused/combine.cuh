// The way home, by the mover warps of layer1: a block of tokens a warp. Partial rows are summed and
// pushed as soon as their tiles are done; at home all contributions are added as they come. Rows
// come through slots of shared memory, several ahead of the one that is added.
#pragma once

#include "comm/pacing.cuh"
#include "comm/wait.cuh"
#include "exchange/call.cuh"
#include "exchange/sums.cuh"
#include "gemm/tile.cuh"
#include "hopper/bulk.cuh"

namespace cometrt {

constexpr u32 kWarpsOfTile = 4 * kWarpgroups;
constexpr int kSumColumns = 1024;  // of a slot: of one row
// Slots of a group are loaded and read together; while one is added, the others are on their way.
constexpr int kSumGroups = 3, kSlotsOfGroup = 2;
constexpr int kPacks = kSumColumns / 256;   // of eight columns, a lane
constexpr int kPacksAhead = TRACE ? 2 : 3;  // a trace leaves no registers for more
constexpr int kMostTerms = 128;  // of a batch of tokens; a token has topk + ranks at most
constexpr int kTermsOfLane = kMostTerms / 32;
constexpr int kRowsAtOnce = 8;  // of a token: looked up together, where topk is larger

struct TokenEnd {
  int term, token;  // its terms end before `term`
};

// The flag of a block that is stored and crossing, or null.
struct SentBlock {
  u64* flag;
  u64 crossed_ns;
};

// One warp's. What is needed now and then lies here, too: registers are for sums.
struct alignas(128) SumSlots {
  __nv_bfloat16 values[kSumGroups][kSlotsOfGroup][kSumColumns];
  u64 full[kSumGroups];  // each slot's lane arrives
  // The terms of a batch of tokens, token after token: a row of this rank's, or ~slot of staging;
  // what it is multiplied by; where those of each token end that has any, and one for nothing.
  int rows[kMostTerms];
  float weights[kMostTerms];
  TokenEnd ends[32 + 1];
  SentBlock summed, pushed;  // the block at hand, and the one before; lane 0's
  u64 epoch;
  int block, list;  // that this warp has taken, and from which list; list is lane 0's

  // By one thread; then a fence of the barriers.
  __device__ void init() {
    for (u64& barrier : full) mbarrier_init(&barrier, kSlotsOfGroup);
    pushed.flag = nullptr;
  }
};

// What a slot holds: columns of one term's row. Pieces of columns follow each other, and in each
// the terms as they are listed.
struct SumItem {
  int term, column;

  __device__ void advance(int items, int num_terms) {
    for (term += items; term >= num_terms; term -= num_terms) column += kSumColumns;
  }
};

// One warp of those that combine; all its lanes stay together.
class Combine {
 public:
  Recorder recorder;  // lane 0 alone tells

  __device__ Combine(const Call& c, const Pace& pace, SumSlots& slots)
      : c_(c), pace_(pace), s_(slots), lane_(threadIdx.x % 32) {
    if (lane_ == 0) s_.epoch = c.world.epoch();
    __syncwarp();
  }

  // Pushes of a chunk come before the home's sums of the chunk before it, so that what peers wait
  // for is never held up. Pushes wait for this rank's tiles alone. Warps take the next block when
  // they have done with one, so that none waits for a CTA that begins late.
  __device__ void run() {
    // Once stopped, layer0 no longer waited for rows: what was made of them must not reach a peer.
    // Every CTA that went on without its rows saw the abort before this launch.
    const bool stopped = lane_ == 0 && c_.world.stopped();
    if (__any_sync(~0u, stopped)) return;
#pragma unroll 1
    for (int chunk = 0; chunk <= c_.num_chunks; ++chunk) {
      if (chunk < c_.num_chunks) {
        if (lane_ == 0) s_.list = 2 * chunk;
        recorder.kind = kReduceAndPush;
        while (push(chunk)) {
        }
        release_push();
      }
      if (chunk > 0) {
        if (lane_ == 0) s_.list = 2 * chunk - 1;
        recorder.kind = kReduceAtHome;
        while (add_at_home(chunk - 1)) {
        }
      }
    }
  }

 private:
  // The next of s_.list, by lane 0.
  __device__ int take() const { return static_cast<int>(atomicAdd(&c_.taken[1 + s_.list], 1)); }
  __device__ int begin(int chunk) const { return chunk * c_.chunk_columns; }
  __device__ int end(int chunk) const { return min(begin(chunk + 1), c_.g.hidden); }

  // The next block, if there is one; false too once the world is stopped.
  __device__ bool push(int chunk) {
    if (lane_ == 0) {
      const int next = take();
      s_.block = next < *c_.num_blocks ? c_.push_blocks[next] : -1;
    }
    __syncwarp();
    if (s_.block < 0) return false;
    const int home = s_.block / c_.g.blocks_per_home, block = s_.block % c_.g.blocks_per_home;
    int token = c_.send_offsets[home] + block * c_.g.block_tokens;
    const int end_token = min(token + c_.g.block_tokens, c_.send_offsets[home + 1]);
    if (lane_ == 0) s_.summed.flag = c_.partials_ready(home, c_.world.rank, block) + chunk;
    while (token < end_token) {
      const bool used = token + lane_ < end_token;
      const int here = list_terms(used ? c_.send_tokens[token + lane_] : -1, nullptr);
      if (!wait_terms(chunk)) return false;
      recorder.begin();
      if (lane_ == 0) {
        s_.summed.crossed_ns = reserve_link(pace_, 2ull * here * (end(chunk) - begin(chunk)));
      }
      sum_batch(chunk, staging_of(token));
      token += here;
      recorder.count(true, 2 * here * (end(chunk) - begin(chunk)));
      recorder.end(s_.block % c_.g.blocks_per_home, chunk);
    }
    release_push();
    if (lane_ == 0) s_.pushed = s_.summed;
    __syncwarp();  // all stores of the block happen before its release
    return true;
  }

  // Where a token of the block, by its place in send_tokens, has its row at home.
  __device__ __nv_bfloat16* staging_of(int place) const {
    const int home = s_.block / c_.g.blocks_per_home;
    const long long slot = place + (c_.send_base[home] - c_.send_offsets[home]);
    return c_.data<__nv_bfloat16>(home, c_.staging_at) + slot * c_.g.hidden;
  }

  // The last block, which crossed while the next one was summed. Releases partials_ready of the
  // block's chunk.
  __device__ void release_push() {
    if (lane_ == 0 && s_.pushed.flag != nullptr) {
      recorder.begin_wait();
      if (s_.pushed.crossed_ns != 0) wait_crossed(s_.pushed.crossed_ns);
      recorder.end_wait(kWaitLink, -1, -1);
      fence_acq_rel_sys();
      store_release_sys(s_.pushed.flag, s_.epoch);
      s_.pushed.flag = nullptr;
    }
    __syncwarp();
  }

  // Own rows first, in fp32, then the contributors by ring distance.
  __device__ bool add_at_home(int chunk) {
    if (lane_ == 0) s_.block = take();
    __syncwarp();
    const int block = s_.block;
    __syncwarp();  // lane 0 may take the next one
    int local = block * c_.g.block_tokens;
    if (local >= c_.num_tokens) return false;
    const int end_local = min(local + c_.g.block_tokens, c_.num_tokens);
    while (local < end_local) {
      const int mine = local + lane_;
      const int token = mine < end_local ? c_.world.rank * c_.g.max_tokens + mine : -1;
      const int here =
          list_terms(token, c_.home_slot + static_cast<long long>(mine) * c_.world.size);
      if (!wait_terms(chunk)) return false;
      recorder.begin();
      sum_batch(chunk, c_.out + static_cast<long long>(local) * c_.g.hidden);
      local += here;
      recorder.count(false, 2 * num_terms_ * (end(chunk) - begin(chunk)));
      recorder.end(block, chunk);
    }
    return true;
  }

  // Each lane a token, or -1 behind the last: its rows here in the order of k; and with `slots`
  // [ranks], its slots of staging. Returns how many of them there was room for.
  __device__ int list_terms(int token, const int* slots) {
    const int* rows = c_.pair_row + static_cast<long long>(token) * c_.g.topk;
    const int topk = token >= 0 ? c_.g.topk : 0;
    const int ranks = token >= 0 && slots != nullptr ? c_.world.size : 0;
    int first[kRowsAtOnce], count = 0;
#pragma unroll
    for (int k = 0; k < kRowsAtOnce; ++k) first[k] = k < topk ? rows[k] : -1;
#pragma unroll 4
    for (int d = 1; d < ranks; ++d) count += slots[d] >= 0;
#pragma unroll 4
    for (int k = kRowsAtOnce; k < topk; ++k) count += rows[k] >= 0;
#pragma unroll
    for (int k = 0; k < kRowsAtOnce; ++k) count += first[k] >= 0;
    int at = count;
    for (int step = 1; step < 32; step *= 2) {
      const int left = __shfl_up_sync(~0u, at, step);
      if (lane_ >= step) at += left;
    }
    const u32 listed = __ballot_sync(~0u, token >= 0 && at <= kMostTerms);  // the first ones
    const u32 some = __ballot_sync(~0u, count > 0) & listed;
    const int tokens = __popc(listed);
    num_terms_ = __shfl_sync(~0u, at, tokens - 1);
    empty_ = listed & ~some;
    if (lane_ < tokens && count > 0) {
      s_.ends[__popc(some & ((1u << lane_) - 1))] = {at, lane_};
      at -= count;
#pragma unroll
      for (int k = 0; k < kRowsAtOnce; ++k) {
        if (first[k] >= 0) s_.rows[at++] = first[k];
      }
      for (int k = kRowsAtOnce; k < topk; ++k) {
        if (rows[k] >= 0) s_.rows[at++] = rows[k];
      }
      for (int d = 1; d < ranks; ++d) {
        if (slots[d] < 0) continue;
        s_.weights[at] = __int_as_float(d);  // until it has come
        s_.rows[at++] = ~slots[d];
      }
    }
    __syncwarp();
    return tokens;
  }

  // A lane a term: its tile is done, or it has come. Acquires tile_done and partials_ready.
  __device__ bool wait_terms(int chunk) {
    bool ready = true, ok = true;
    for (int i = lane_; i < num_terms_; i += 32) {
      const int row = s_.rows[i];
      ready &= row < 0 ? partial_is_ready(i, chunk) : tile_is_done(row / BLOCK_M, chunk);
    }
    if (!__all_sync(~0u, ready)) {
      release_push();  // peers do not wait for what this warp waits for
      if (Recorder::kOn) ok = wait_rows(chunk);
      recorder.begin_wait();
      for (int i = lane_; i < num_terms_ && ok; i += 32) {
        const int row = s_.rows[i];
        ok = row < 0 ? wait_partial(i, chunk) : wait_tile(row / BLOCK_M, chunk);
      }
      ok = __all_sync(~0u, ok);
      recorder.end_wait(kWaitPartialsReady, -1, chunk);
    }
    float weights[kTermsOfLane];  // on their way together
#pragma unroll
    for (int j = 0; j < kTermsOfLane; ++j) {
      const int i = lane_ + 32 * j, row = i < num_terms_ ? s_.rows[i] : -1;
      weights[j] = row >= 0 && c_.weighted ? c_.row_weight[row] : 1.0f;
    }
#pragma unroll
    for (int j = 0; j < kTermsOfLane; ++j) {
      if (lane_ + 32 * j < num_terms_) s_.weights[lane_ + 32 * j] = weights[j];
    }
    fence_proxy_async();  // what was acquired is read by bulk copies
    __syncwarp();         // what a lane acquired, all may read
    return ok;
  }
  // First, where a trace tells the wait for this rank's own tiles from that for its peers.
  __device__ bool wait_rows(int chunk) {
    bool ok = true;
    recorder.begin_wait();
    for (int i = lane_; i < num_terms_ && ok; i += 32) {
      if (s_.rows[i] >= 0) ok = wait_tile(s_.rows[i] / BLOCK_M, chunk);
    }
    ok = __all_sync(~0u, ok);
    recorder.end_wait(kWaitTileDone, -1, chunk);
    return ok;
  }
  __device__ const u32* done_flag(int tile, int chunk) const {
    return &c_.tile_done[tile * c_.num_chunks + chunk];
  }
  __device__ u32 when_done(int chunk) const {
    return kWarpsOfTile * ((end(chunk) - begin(chunk) + BLOCK_N - 1) / BLOCK_N);
  }
  __device__ bool tile_is_done(int tile, int chunk) const {
    return load_acquire_gpu(done_flag(tile, chunk)) >= when_done(chunk);
  }
  __device__ bool wait_tile(int tile, int chunk) const {
    const u32* done = done_flag(tile, chunk);
    return wait_until(c_.world, {kTileDone, c_.world.rank, tile, chunk}, s_.epoch, when_done(chunk),
                      [&] { return load_acquire_gpu(done); });
  }
  __device__ const u64* ready_flag(int term, int chunk, int* contributor, int* block) const {
    const int d = __float_as_int(s_.weights[term]), me = c_.world.rank;
    *contributor = (me + d) % c_.world.size;
    *block = (~s_.rows[term] - c_.home_base[d]) / c_.g.block_tokens;
    return c_.partials_ready(me, *contributor, *block) + chunk;
  }
  __device__ bool partial_is_ready(int term, int chunk) const {
    int contributor, block;
    return load_acquire_sys(ready_flag(term, chunk, &contributor, &block)) >= s_.epoch;
  }
  __device__ bool wait_partial(int term, int chunk) const {
    int contributor, block;
    const u64* flag = ready_flag(term, chunk, &contributor, &block);
    return wait_until(c_.world, {kPartialsReady, contributor, block, chunk}, s_.epoch, s_.epoch,
                      [&] { return load_acquire_sys(flag); });
  }

  // The sums of the listed terms of a batch: the chunk's columns of rows of `to`.
  __device__ void sum_batch(int chunk, __nv_bfloat16* to) {
    const int first = begin(chunk), last = end(chunk);
    store_zeros(to, first, last);
    const int items = (last - first + kSumColumns - 1) / kSumColumns * num_terms_;
    if (items == 0) return;
    SumItem ahead{0, first};  // of this lane's slot of the next group
    ahead.advance(lane_ % kSlotsOfGroup, num_terms_);
#pragma unroll 1
    for (int i = 0; i < kSumGroups; ++i) {
      load((at_.slot + i) % kSumGroups, ahead, items - kSlotsOfGroup * i, last);
    }
    float sum[kPacks][8] = {};
    int term = 0, column = first + 8 * lane_, token = 0;
    TokenEnd end = s_.ends[0];
    const auto end_term = [&] {
      if (++term < end.term) return;
      __nv_bfloat16* row =
          to + (static_cast<u64>(static_cast<u32>(end.token)) * static_cast<u32>(c_.g.hidden) +
                static_cast<u32>(column));
#pragma unroll
      for (int i = 0; i < kPacks; ++i) {
        if (column + 256 * i < last) store_row(row + 256 * i, sum[i]);
#pragma unroll
        for (float& value : sum[i]) value = 0;
      }
      ++token;
      if (term == num_terms_) term = 0, token = 0, column += kSumColumns;
      end = s_.ends[token];
    };
#pragma unroll 1
    for (int left = items; left > 0; left -= kSlotsOfGroup) {
      // What lies behind a row's columns, or in a slot that was not loaded, is added to sums that
      // are not stored.
      uint4 packed[kPacksAhead];  // on their way from the group while those before are added
      const float weights[] = {s_.weights[term], s_.weights[term + 1 < num_terms_ ? term + 1 : 0]};
      mbarrier_wait(&s_.full[at_.slot], at_.phase);
      const uint4* values = reinterpret_cast<const uint4*>(s_.values[at_.slot]) + lane_;
#pragma unroll
      for (int i = 0; i < kPacksAhead; ++i) packed[i] = values[32 * i];
      const auto add = [&](int i) {
        add_packed(sum[i % kPacks], packed[i % kPacksAhead], weights[i / kPacks]);
        const int next = i + kPacksAhead;
        if (next < kSlotsOfGroup * kPacks) packed[i % kPacksAhead] = values[32 * next];
      };
#pragma unroll
      for (int i = 0; i < kPacks; ++i) add(i);
      end_term();
#pragma unroll
      for (int i = kPacks; i < kSlotsOfGroup * kPacks; ++i) {
        if (i + kPacksAhead == kSlotsOfGroup * kPacks) {
          __syncwarp();  // the group has been read
          load(at_.slot, ahead, left - kSumGroups * kSlotsOfGroup, last);
          at_.advance();
        }
        add(i);
      }
      if (left > 1) end_term();
    }
    __syncwarp();  // the list may be written again
  }

  // For tokens without terms.
  __device__ void store_zeros(__nv_bfloat16* to, int first, int last) const {
    const float zeros[8] = {};
    for (u32 left = empty_; left != 0; left &= left - 1) {
      __nv_bfloat16* row = to + static_cast<long long>(__ffs(left) - 1) * c_.g.hidden;
      for (int i = first + 8 * lane_; i < last; i += 256) store_row(row + i, zeros);
    }
  }

  // The next of `left` items, if any: a lane a slot. Lanes without an item arrive without bytes.
  __device__ void load(int group, SumItem& of, int left, int last) {
    if (lane_ >= kSlotsOfGroup || left <= 0) return;
    u64* full = &s_.full[group];
    if (lane_ >= left) {
      mbarrier_arrive(full);
      return;
    }
    const int row = s_.rows[of.term];
    const __nv_bfloat16* from =
        row >= 0 ? c_.partial_rows : c_.data<__nv_bfloat16>(c_.world.rank, c_.staging_at);
    from +=
        static_cast<u64>(static_cast<u32>(row >= 0 ? row : ~row)) * static_cast<u32>(c_.g.hidden) +
        static_cast<u32>(of.column);
    const u32 bytes = 2 * min(kSumColumns, last - of.column);
    mbarrier_arrive_expect(full, bytes);
    bulk_load<Keep::kBriefly>(s_.values[group][lane_], from, bytes, full);
    of.advance(kSlotsOfGroup, num_terms_);
  }

  const Call& c_;
  const Pace& pace_;
  SumSlots& s_;
  int lane_, num_terms_ = 0;
  u32 empty_ = 0;        // tokens of the batch that have no terms, a bit each
  Ring<kSumGroups> at_;  // of groups; goes on from batch to batch
};

}  // namespace cometrt
