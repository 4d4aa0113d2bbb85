// The way home, by the mover warps of layer1: a block of tokens a warp. Partial rows are summed and
// pushed as soon as their tiles are done; at home all contributions are added as they come.
#pragma once

#include "comm/pacing.cuh"
#include "comm/wait.cuh"
#include "exchange/call.cuh"
#include "exchange/sums.cuh"
#include "gemm/tile.cuh"

namespace cometrt {

constexpr int kGroups = 3;  // more do not fit the movers' registers
constexpr u32 kWarpsOfTile = 4 * kWarpgroups;

// One warp of the movers; all its lanes stay together.
class Combine {
 public:
  __device__ Combine(const Call& c, const Pace& pace)
      : c_(c), pace_(pace), epoch_(c.world.epoch()), lane_(threadIdx.x % 32) {}

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
        for (int i = mover; i < *c_.num_blocks; i += num_movers) {
          if (!push(c_.push_blocks[i], chunk)) return;
        }
      }
      if (chunk > 0) {
        for (int i = mover; i < blocks; i += num_movers) {
          if (!add_at_home(i, chunk - 1)) return;
        }
      }
    }
  }

 private:
  __device__ int begin(int chunk) const { return chunk * c_.chunk_columns; }
  __device__ int end(int chunk) const { return min(begin(chunk + 1), c_.g.hidden); }

  // A token's row on this rank, or -1.
  __device__ int row_of(long long token, int k) const { return c_.pair_row[token * c_.g.topk + k]; }

  // Acquires tile_done; for `count` tokens, the i-th of which is token_of(i).
  template <typename TokenOf>
  __device__ bool wait_tiles(int count, int chunk, TokenOf token_of) {
    const u32 columns = end(chunk) - begin(chunk);
    const u32 expected = kWarpsOfTile * ((columns + BLOCK_N - 1) / BLOCK_N);
    bool ok = true;
    for (int i = lane_; i < count * c_.g.topk && ok; i += 32) {
      const int row = row_of(token_of(i / c_.g.topk), i % c_.g.topk);
      if (row < 0) continue;
      const int tile = row / BLOCK_M;
      const u32* done = &c_.tile_done[tile * c_.num_chunks + chunk];
      ok = wait_until(c_.world, {kTileDone, c_.world.rank, tile, chunk}, epoch_, expected,
                      [&] { return load_acquire_gpu(done); });
    }
    ok = __all_sync(~0u, ok);
    __syncwarp();  // what a lane acquired, all may read
    return ok;
  }

  // Groups of 256 columns, eight a lane, several at a time so that loads overlap.
  template <typename AddAll>
  __device__ void sum_row(int chunk, __nv_bfloat16* to, AddAll add_all) const {
    for (int column = begin(chunk) + 8 * lane_; column < end(chunk); column += kGroups * 256) {
      const int groups = min(kGroups, (end(chunk) - column + 255) / 256);
      float sum[kGroups][8] = {};
      add_all([&](const __nv_bfloat16* row, float weight) {
        uint4 packed[kGroups];
#pragma unroll
        for (int i = 0; i < kGroups; ++i) {
          if (i < groups)
            packed[i] = __ldcg(reinterpret_cast<const uint4*>(row + column + 256 * i));
        }
#pragma unroll
        for (int i = 0; i < kGroups; ++i) {
          if (i < groups) add_packed(sum[i], packed[i], weight);
        }
      });
#pragma unroll
      for (int i = 0; i < kGroups; ++i) {
        if (i < groups) store_row(to + column + 256 * i, sum[i]);
      }
    }
  }

  // This rank's rows of a token, in the order of k.
  template <typename Add>
  __device__ void add_own_rows(long long token, Add add) const {
    for (int k = 0; k < c_.g.topk; ++k) {
      const int row = row_of(token, k);
      if (row < 0) continue;
      const float weight = c_.weighted ? c_.row_weight[row] : 1.0f;
      add(c_.partial_rows + static_cast<long long>(row) * c_.g.hidden, weight);
    }
  }

  // Releases partials_ready of the block's chunk.
  __device__ bool push(int item, int chunk) {
    const int home = item / c_.g.blocks_per_home, block = item % c_.g.blocks_per_home;
    const int size = c_.g.block_tokens, first = c_.send_offsets[home] + block * size;
    const int count = min(size, c_.send_offsets[home + 1] - first);
    const int* tokens = c_.send_tokens + first;
    if (!wait_tiles(count, chunk, [&](int i) { return tokens[i]; })) return false;
    u64 crossed_ns = 0;
    if (lane_ == 0) {
      crossed_ns = reserve_link(pace_, 2ull * count * (end(chunk) - begin(chunk)));
    }
    for (int i = 0; i < count; ++i) {
      const long long slot = c_.send_base[home] + block * size + i;
      sum_row(chunk, c_.data<__nv_bfloat16>(home, c_.staging_at) + slot * c_.g.hidden,
              [&](auto add) { add_own_rows(tokens[i], add); });
    }
    __syncwarp();  // all stores of the block happen before its release
    if (lane_ == 0) {
      if (crossed_ns != 0) wait_crossed(crossed_ns);
      fence_acq_rel_sys();
      store_release_sys(c_.partials_ready(home, c_.world.rank, block) + chunk, epoch_);
    }
    return true;
  }

  // Own rows first, in fp32, then the contributors by ring distance. Acquires partials_ready.
  __device__ bool add_at_home(int block, int chunk) {
    const int me = c_.world.rank, ranks = c_.world.size, size = c_.g.block_tokens;
    const int first = block * size, count = min(size, c_.num_tokens - first);
    const long long global = static_cast<long long>(me) * c_.g.max_tokens + first;
    if (!wait_tiles(count, chunk, [&](int i) { return global + i; })) return false;
    bool ok = true;
    for (int i = lane_; i < count * ranks && ok; i += 32) {
      const int slot = c_.home_slot[first * ranks + i], d = i % ranks;
      if (slot < 0) continue;
      const int contributor = (me + d) % ranks, its_block = (slot - c_.home_base[d]) / size;
      const u64* flag = c_.partials_ready(me, contributor, its_block) + chunk;
      ok = wait_until(c_.world, {kPartialsReady, contributor, its_block, chunk}, epoch_, epoch_,
                      [&] { return load_acquire_sys(flag); });
    }
    if (!__all_sync(~0u, ok)) return false;
    __syncwarp();  // what a lane acquired, all may read
    const __nv_bfloat16* staging = c_.data<__nv_bfloat16>(me, c_.staging_at);
    for (int i = 0; i < count; ++i) {
      const int* slots = c_.home_slot + static_cast<long long>(first + i) * ranks;
      sum_row(chunk, c_.out + static_cast<long long>(first + i) * c_.g.hidden, [&](auto add) {
        add_own_rows(global + i, add);
        for (int d = 1; d < ranks; ++d) {
          if (slots[d] >= 0) add(staging + static_cast<long long>(slots[d]) * c_.g.hidden, 1.0f);
        }
      });
    }
    return true;
  }

  const Call& c_;
  const Pace& pace_;
  u64 epoch_;
  int lane_;
};

}  // namespace cometrt
