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
constexpr int kSumSlots = 5, kSumColumns = 1024;  // columns of a slot: of one row
constexpr int kMostTerms = 256;  // of a batch of tokens; a token has topk + ranks at most

// One warp's.
struct alignas(128) SumSlots {
  __nv_bfloat16 values[kSumSlots][kSumColumns];
  u64 full[kSumSlots];
  // The terms of a batch of tokens, token after token: a row of this rank's, or ~slot of staging;
  // what it is multiplied by; where each token's end.
  int rows[kMostTerms];
  float weights[kMostTerms];
  int ends[32];
  // The flag of a block that is stored and crossing, or null; lane 0's.
  u64* pushed;
  u64 pushed_crossed_ns;
};

// A place in the order in which terms are added: by token, piece of columns, term.
struct SumCursor {
  int token = 0, piece = 0, term = 0;

  __device__ void skip_empty(const SumSlots& s, int count) {
    while (token < count && term == s.ends[token]) ++token;
  }
  __device__ void advance(const SumSlots& s, int count, int pieces) {
    if (++term < s.ends[token]) return;
    if (++piece < pieces) {
      term = token ? s.ends[token - 1] : 0;
    } else {
      piece = 0;
      ++token;
      skip_empty(s, count);
    }
  }
};

// One warp of the movers; all its lanes stay together.
class Combine {
 public:
  Recorder recorder;  // lane 0 alone tells

  __device__ Combine(const Call& c, const Pace& pace, SumSlots& slots)
      : c_(c), pace_(pace), s_(slots), epoch_(c.world.epoch()), lane_(threadIdx.x % 32) {}

  // Pushes of a chunk come before the home's sums of the chunk before it, so that what peers wait
  // for is never held up. Pushes wait for this rank's tiles alone.
  __device__ void run(int mover, int num_movers) {
    // Once stopped, layer0 no longer waited for rows: what was made of them must not reach a peer.
    // Every CTA that went on without its rows saw the abort before this launch.
    const bool stopped = lane_ == 0 && c_.world.stopped();
    if (__any_sync(~0u, stopped)) return;
    const int blocks = (c_.num_tokens + c_.g.block_tokens - 1) / c_.g.block_tokens;
    for (int chunk = 0; chunk <= c_.num_chunks; ++chunk) {
      if (chunk < c_.num_chunks) {
        recorder.kind = kReduceAndPush;
        for (int i = mover; i < *c_.num_blocks; i += num_movers) {
          if (!push(c_.push_blocks[i], chunk)) return;
        }
        release_push();
      }
      if (chunk > 0) {
        recorder.kind = kReduceAtHome;
        for (int i = mover; i < blocks; i += num_movers) {
          if (!add_at_home(i, chunk - 1)) return;
        }
      }
    }
  }

 private:
  __device__ int begin(int chunk) const { return chunk * c_.chunk_columns; }
  __device__ int end(int chunk) const { return min(begin(chunk + 1), c_.g.hidden); }

  __device__ bool push(int item, int chunk) {
    const int home = item / c_.g.blocks_per_home, block = item % c_.g.blocks_per_home;
    const int size = c_.g.block_tokens, first = c_.send_offsets[home] + block * size;
    const int count = min(size, c_.send_offsets[home + 1] - first);
    const int batch = min(32, kMostTerms / c_.g.topk);
    const long long slot = c_.send_base[home] + block * size;
    __nv_bfloat16* to = c_.data<__nv_bfloat16>(home, c_.staging_at) + slot * c_.g.hidden;
    u64 crossed_ns = 0;
    for (int i = 0; i < count; i += batch) {
      const int here = min(batch, count - i);
      const int token = lane_ < here ? c_.send_tokens[first + i + lane_] : -1;
      list_terms(token, nullptr);
      if (!wait_terms(chunk)) return false;
      recorder.begin();
      if (lane_ == 0) {
        crossed_ns = reserve_link(pace_, 2ull * here * (end(chunk) - begin(chunk)));
      }
      sum_batch(here, chunk, to + static_cast<long long>(i) * c_.g.hidden);
      recorder.count(true, 2 * here * (end(chunk) - begin(chunk)));
      recorder.end(block, chunk);
    }
    release_push();
    if (lane_ == 0) {
      s_.pushed = c_.partials_ready(home, c_.world.rank, block) + chunk;
      s_.pushed_crossed_ns = crossed_ns;
    }
    __syncwarp();  // all stores of the block happen before its release
    return true;
  }

  // The last block, which crossed while the next one was summed. Releases partials_ready of the
  // block's chunk.
  __device__ void release_push() {
    if (lane_ == 0 && s_.pushed != nullptr) {
      recorder.begin_wait();
      if (s_.pushed_crossed_ns != 0) wait_crossed(s_.pushed_crossed_ns);
      recorder.end_wait(kWaitLink, -1, -1);
      fence_acq_rel_sys();
      store_release_sys(s_.pushed, epoch_);
      s_.pushed = nullptr;
    }
    __syncwarp();
  }

  // Own rows first, in fp32, then the contributors by ring distance.
  __device__ bool add_at_home(int block, int chunk) {
    const int size = c_.g.block_tokens, first = block * size;
    const int count = min(size, c_.num_tokens - first);
    const int batch = min(32, kMostTerms / (c_.g.topk + c_.world.size));
    for (int i = 0; i < count; i += batch) {
      const int here = min(batch, count - i), local = first + i + lane_;
      const bool used = lane_ < here;
      list_terms(used ? c_.world.rank * c_.g.max_tokens + local : -1,
                 c_.home_slot + static_cast<long long>(local) * c_.world.size);
      if (!wait_terms(chunk)) return false;
      recorder.begin();
      sum_batch(here, chunk, c_.out + static_cast<long long>(first + i) * c_.g.hidden);
      recorder.count(false, 2 * num_terms_ * (end(chunk) - begin(chunk)));
      recorder.end(block, chunk);
    }
    return true;
  }

  // Each lane a token, or -1: its rows here in the order of k; and with `slots` [ranks], its slots
  // of staging.
  __device__ void list_terms(int token, const int* slots) {
    const int* rows = c_.pair_row + static_cast<long long>(token) * c_.g.topk;
    int count = 0;
    if (token >= 0) {
#pragma unroll 4
      for (int k = 0; k < c_.g.topk; ++k) count += rows[k] >= 0;
      for (int d = 1; d < c_.world.size && slots != nullptr; ++d) count += slots[d] >= 0;
    }
    int at = count;
    for (int step = 1; step < 32; step *= 2) {
      const int left = __shfl_up_sync(~0u, at, step);
      if (lane_ >= step) at += left;
    }
    num_terms_ = __shfl_sync(~0u, at, 31);
    s_.ends[lane_] = at;
    at -= count;
    if (token >= 0) {
      for (int k = 0; k < c_.g.topk; ++k) {
        if (rows[k] >= 0) s_.rows[at++] = rows[k];
      }
      for (int d = 1; d < c_.world.size && slots != nullptr; ++d) {
        if (slots[d] < 0) continue;
        s_.weights[at] = __int_as_float(d);  // until it has come
        s_.rows[at++] = ~slots[d];
      }
    }
    __syncwarp();
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
#if TRACE  // which has no registers for more
#pragma unroll 1
#endif
    for (int i = lane_; i < num_terms_; i += 32) {
      const int row = s_.rows[i];
      s_.weights[i] = row >= 0 && c_.weighted ? c_.row_weight[row] : 1.0f;
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
    return wait_until(c_.world, {kTileDone, c_.world.rank, tile, chunk}, epoch_, when_done(chunk),
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
    return load_acquire_sys(ready_flag(term, chunk, &contributor, &block)) >= epoch_;
  }
  __device__ bool wait_partial(int term, int chunk) const {
    int contributor, block;
    const u64* flag = ready_flag(term, chunk, &contributor, &block);
    return wait_until(c_.world, {kPartialsReady, contributor, block, chunk}, epoch_, epoch_,
                      [&] { return load_acquire_sys(flag); });
  }

  // The sums of the listed terms of `count` tokens: the chunk's columns of rows of `to`.
  __device__ void sum_batch(int count, int chunk, __nv_bfloat16* to) {
    const int first = begin(chunk), columns = end(chunk) - first;
    const int pieces = (columns + kSumColumns - 1) / kSumColumns;
    SumCursor ahead;
    ahead.skip_empty(s_, count);
    const auto load_next = [&](int slot) {
      if (ahead.token >= count) return;
      if (lane_ == 0) load(slot, ahead, first, columns);
      ahead.advance(s_, count, pieces);
    };
    for (int i = 0; i < kSumSlots; ++i) load_next((at_.slot + i) % kSumSlots);
    for (int token = 0; token < count; ++token, to += c_.g.hidden) {
      const int begin_term = token ? s_.ends[token - 1] : 0, end_term = s_.ends[token];
      for (int piece = 0; piece < pieces; ++piece) {
        const int column = piece * kSumColumns + 8 * lane_;
        float sum[kSumColumns / 256][8] = {};
        for (int term = begin_term; term < end_term; ++term) {
          const float weight = s_.weights[term];
          mbarrier_wait(&s_.full[at_.slot], at_.phase);
          const __nv_bfloat16* values = s_.values[at_.slot] + 8 * lane_;
#pragma unroll
          for (int i = 0; i < kSumColumns / 256; ++i) {
            if (column + 256 * i < columns) add_row(sum[i], values + 256 * i, weight);
          }
          __syncwarp();  // the slot has been read
          load_next(at_.slot);
          at_.advance();
        }
#pragma unroll
        for (int i = 0; i < kSumColumns / 256; ++i) {
          if (column + 256 * i < columns) store_row(to + first + column + 256 * i, sum[i]);
        }
      }
    }
    __syncwarp();  // the list may be written again
  }

  __device__ void load(int slot, const SumCursor& of, int first, int columns) {
    const int row = s_.rows[of.term], at = of.piece * kSumColumns;
    const __nv_bfloat16* from =
        row >= 0 ? c_.partial_rows + 1ll * row * c_.g.hidden
                 : c_.data<__nv_bfloat16>(c_.world.rank, c_.staging_at) + 1ll * ~row * c_.g.hidden;
    const u32 bytes = 2 * min(kSumColumns, columns - at);
    mbarrier_arrive_expect(&s_.full[slot], bytes);
    bulk_load<Keep::kBriefly>(s_.values[slot], from + first + at, bytes, &s_.full[slot]);
  }

  const Call& c_;
  const Pace& pace_;
  SumSlots& s_;
  u64 epoch_;
  int lane_, num_terms_ = 0;
  Ring<kSumSlots> at_;
};

}  // namespace cometrt
