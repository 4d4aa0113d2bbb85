// The way home, by the mover warps of layer1 and those that help: a block of tokens a warp. Partial
// rows are summed and pushed as soon as their tiles are done; at home all contributions are added
// as they come.
#pragma once

#include "comm/pacing.cuh"
#include "comm/wait.cuh"
#include "fused/row_sums.cuh"

namespace cometrt {

constexpr u32 kWarpsOfTile = 4 * kWarpgroups;

// One warp of those that combine; all its lanes stay together.
class Combine : RowSums {
 public:
  Recorder recorder;  // lane 0 alone tells

  __device__ Combine(const Call& c, const Pace& pace, SumSlots& slots)
      : RowSums(c, slots), pace_(pace) {
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

  const Pace& pace_;
};

}  // namespace cometrt
