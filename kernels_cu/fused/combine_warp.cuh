// The combine warps of gemm_combine and up_dgrad_combine_wgrad. A warp pops one token block at a
// time. Push: it waits for the tokens' tiles on this rank (tile_done) and sums their rows. It
// stores the partial rows in the home's staging buffer and signals partials_ready there. Reduce:
// for this rank's own tokens it adds local rows and the contributors' partial rows (partials_ready)
// into the output.
#pragma once

#include "fused/row_sums.cuh"
#include "fused/tile_done.cuh"
#include "protocol/dweight.cuh"
#include "protocol/emulated_link.cuh"
#include "protocol/wait.cuh"

namespace cometrt {

// One combine warp. All lanes run converged. kHasDweight: together with N-chunk 0, dweight of the
// rows is sent and summed. An earlier launch has completed it.
template <bool kHasDweight>
class CombineWarp : RowSums {
 public:
  Recorder recorder;  // lane 0 alone records

  __device__ CombineWarp(const ExchangeParams& p, const EmulatedLink& link, CombineStages& stages)
      : RowSums(p, stages), link_(link) {
    if (lane_ == 0) s_.epoch = p.world.epoch(), s_.block_tokens = *p.block_tokens;
    __syncwarp();
  }

  __device__ void run() {
    // In a stopped world dispatch_gemm multiplies without its rows, and such results must not reach
    // a peer. A CTA that did so saw the abort before this launch, so this warp sees it too.
    const bool stopped = lane_ == 0 && is_stopped(p_.world);
    if (__any_sync(~0u, stopped)) return;
#if LATE
    run_by_parts();
#else
    run_by_n_chunks();
#endif
  }

 private:
#if LATE
  // With one N-chunk. In turn for the last part, ..., the first one, own tokens: push the blocks,
  // then reduce the rows at home. The blocks of a turn are all that have a token of its part, so a
  // reduction waits for pushes that every warp of every rank does before its own reductions of that
  // turn. Home blocks have rows of one part.
  __device__ void run_by_parts() {
    if (lane_ < p_.num_parts) s_.turn_ends[lane_] = p_.turn_ends[lane_];
    if (lane_ == 0) s_.kept[0] = s_.kept[1] = -1;
    __syncwarp();
#pragma unroll 1
    for (int turn = 0; turn <= p_.num_parts; ++turn) {
      if (lane_ == 0) s_.turn = turn, s_.list = 0;
      recorder.kind = kReduceAndPush;
      while (push(0)) {
      }
      signal_push();
      if (lane_ == 0) s_.list = 1;
      recorder.kind = kReduceAtHome;
      while (add_at_home(0)) {
      }
    }
  }
  // The first of a home's rows of a turn; that of turn -1 is behind the parts.
  __device__ int first_row(int turn) const {
    const int parts = p_.num_parts;
    return turn < 0 || turn == parts ? p_.late_rows : (parts - 1 - turn) * p_.part_rows;
  }
  // Blocks at home of the turns before this one. All turns of parts but the first have equally
  // many.
  __device__ int home_blocks_before(int turn) const {
    const auto blocks = [&](int rows) { return (rows + s_.block_tokens - 1) / s_.block_tokens; };
    if (turn == 0) return 0;
    return blocks(first_row(-1) - first_row(0)) + (turn - 1) * blocks(p_.part_rows);
  }

  // By lane 0: the next ticket of queue s_.list, or kNoTicket behind the last one of this turn. The
  // warp keeps that ticket for a later turn.
  __device__ int pop() const {
    int& kept = s_.kept[s_.list];
    if (kept < 0) kept = static_cast<int>(atomicAdd(&p_.queue_heads[1 + s_.list], 1));
    if (s_.turn < p_.num_parts) {
      const int end = s_.list == 0 ? s_.turn_ends[s_.turn] : home_blocks_before(s_.turn + 1);
      if (kept >= end) return kNoTicket;
    }
    const int ticket = kept;
    kept = -1;
    return ticket;
  }
  // The rows of a block at home, for its ticket.
  __device__ int rows_at_home(int ticket, int* end) const {
    *end = p_.num_tokens;
    if (ticket == kNoTicket) return p_.num_tokens;
    int turn = 0;
    while (turn < p_.num_parts && ticket >= home_blocks_before(turn + 1)) ++turn;
    const int begin = first_row(turn) + (ticket - home_blocks_before(turn)) * s_.block_tokens;
    const int last = turn < p_.num_parts ? first_row(turn - 1) : p_.num_tokens;
    *end = min(begin + s_.block_tokens, last);
    return begin;
  }
  // Counts complete rows of a part, or own ones: a release at gpu scope. The partner is rail_wait.
  __device__ void count_rows(int row, int count) const {
    __syncwarp();  // orders all lanes' stores before lane 0's release
    const int part = row < p_.late_rows ? p_.part_of_row(row) : p_.num_parts;
    if (lane_ == 0) add_release_gpu(&p_.part_sums[part], count);
  }
#else
  // Order: push N-chunk 0, push 1, reduce 0, push 2, reduce 1, and so on. Pushes wait for this
  // rank's tiles only. So a wait for peers never delays what peers wait for.
  __device__ void run_by_n_chunks() {
#pragma unroll 1
    for (int n_chunk = 0; n_chunk <= p_.num_n_chunks; ++n_chunk) {
      if (n_chunk < p_.num_n_chunks) {
        if (lane_ == 0) s_.list = 2 * n_chunk;
        recorder.kind = kReduceAndPush;
        while (push(n_chunk)) {
        }
        signal_push();
      }
      if (n_chunk > 0) {
        if (lane_ == 0) s_.list = 2 * n_chunk - 1;
        recorder.kind = kReduceAtHome;
        while (add_at_home(n_chunk - 1)) {
        }
      }
    }
  }

  // By lane 0: the next ticket of queue s_.list.
  __device__ int pop() const {
    return static_cast<int>(atomicAdd(&p_.queue_heads[1 + s_.list], 1));
  }
  __device__ int rows_at_home(int ticket, int* end) const {
    const int begin = ticket * s_.block_tokens;
    *end = min(begin + s_.block_tokens, p_.num_tokens);
    return begin;
  }
  __device__ void count_rows(int, int) const {}
#endif

  // Pops a token block, sums it and pushes it. False if none is left or the world has stopped.
  __device__ bool push(int n_chunk) {
    if (lane_ == 0) {
      const int next = pop();
      s_.block = next < *p_.num_blocks ? p_.push_blocks[next] : -1;
    }
    __syncwarp();
    if (s_.block < 0) return false;
    const int home = s_.block / p_.g.blocks_per_home, block = s_.block % p_.g.blocks_per_home;
    int token = p_.send_offsets[home] + block * s_.block_tokens;
    const int end_token = min(token + s_.block_tokens, p_.send_offsets[home + 1]);
    if (lane_ == 0) s_.summed.flag = p_.partials_ready(home, p_.world.rank, block) + n_chunk;
    if (kHasDweight && n_chunk == 0) send_dweight(home, token, end_token);
    while (token < end_token) {
      const bool used = token + lane_ < end_token;
      const int here = list_addends(used ? p_.send_tokens[token + lane_] : -1, nullptr);
      if (!wait_addends(n_chunk)) return false;
      recorder.begin();
      if (lane_ == 0) {
        s_.summed.transferred_ns =
            begin_transfer(link_, 2ull * here * (end(n_chunk) - begin(n_chunk)));
      }
      sum_batch(n_chunk, staging_of(token));
      token += here;
      recorder.count(true, 2 * here * (end(n_chunk) - begin(n_chunk)));
      recorder.end(s_.block % p_.g.blocks_per_home, n_chunk);
    }
    signal_push();
    if (lane_ == 0) s_.pushed = s_.summed;
    __syncwarp();  // orders all lanes' stores of the block before lane 0's later signal
    return true;
  }

  // Stores this rank's dweight of send_tokens [first, end) in their home's memory.
  __device__ void send_dweight(int home, int first, int end) const {
#pragma unroll 1
    for (int i = first + lane_; i < end; i += 32) {  // a token a lane: its pairs are close together
      const int token = p_.send_tokens[i], local = token - home * p_.g.max_tokens;
#pragma unroll 1
      for (int k = 0; k < p_.g.topk; ++k) {
        const int row = p_.pair_row[static_cast<long long>(token) * p_.g.topk + k];
        if (row < 0) continue;
        const int shard = p_.world.rank % p_.g.tp, pair = local * p_.g.topk + k;
        *dweight_part(p_, home, shard, pair) = dweight_of_row(p_, row);
      }
    }
  }

  // The staging row in the home's memory of send_tokens[index].
  __device__ __nv_bfloat16* staging_of(int index) const {
    const int home = s_.block / p_.g.blocks_per_home;
    const long long row = index + (p_.send_base[home] - p_.send_offsets[home]);
    return p_.data<__nv_bfloat16>(home, p_.staging_offset) + row * p_.g.hidden;
  }

  // Signals partials_ready of the last pushed block: lane 0, fence and release at system scope. It
  // is called one block late, so that the transfer overlaps with the next sum. The partners are
  // wait_addends() or home_reduce at the home.
  __device__ void signal_push() {
    if (lane_ == 0 && s_.pushed.flag != nullptr) {
      recorder.begin_wait();
      wait_transferred(s_.pushed.transferred_ns);
      recorder.end_wait(kWaitLink, -1, -1);
      fence_system();
      signal(s_.pushed.flag, s_.epoch);
      s_.pushed.flag = nullptr;
    }
    __syncwarp();
  }

  // Pops a block of this rank's own tokens and reduces it in fp32: local rows in the order of k,
  // then contributors by ring distance. False if none is left or the world has stopped.
  __device__ bool add_at_home(int n_chunk) {
    if (lane_ == 0) s_.block = pop();
    __syncwarp();
    const int block = s_.block;
    __syncwarp();  // all lanes have read s_.block before the next pop
    int end_local, local = rows_at_home(block, &end_local);
    if (local >= p_.num_tokens) return false;
    while (local < end_local) {
      const int mine = local + lane_;
      const int token = mine < end_local ? p_.world.rank * p_.g.max_tokens + mine : -1;
      const int here =
          list_addends(token, p_.staging_row + static_cast<long long>(mine) * p_.world.size);
      if (!wait_addends(n_chunk)) return false;
      recorder.begin();
      sum_batch(n_chunk, p_.out + static_cast<long long>(local) * p_.g.hidden);
      if (kHasDweight && n_chunk == 0) sum_dweight(local, local + here);
      count_rows(local, here);
      local += here;
      recorder.count(false, 2 * num_addends_ * (end(n_chunk) - begin(n_chunk)));
      recorder.end(block, n_chunk);
    }
    return true;
  }

  // Sums dweight of this rank's own tokens [first, end). Called after wait_addends(), since
  // contributors store their parts before they signal partials_ready.
  __device__ void sum_dweight(int first, int end) const {
    const int first_token = p_.world.rank * p_.g.max_tokens;
#pragma unroll 1
    for (int local = first + lane_; local < end; local += 32) {
#pragma unroll 1
      for (int k = 0; k < p_.g.topk; ++k) {
        const int row = p_.pair_row[static_cast<long long>(first_token + local) * p_.g.topk + k];
        const int pair = local * p_.g.topk + k;
        p_.out_dweight[pair] = sum_dweight_parts(p_, pair, row);
      }
    }
  }

  // Waits for all listed addends, a lane each. Acquires tile_done at gpu scope (TileDoneSignal) and
  // partials_ready at system scope (signal_push() of the contributor). False if the world has
  // stopped.
  __device__ bool wait_addends(int n_chunk) {
    bool ready = true, ok = true;
    for (int i = lane_; i < num_addends_; i += 32) {
      const int row = s_.rows[i];
      ready &= row < 0 ? partial_is_ready(i, n_chunk) : tile_is_done(row / BLOCK_M, n_chunk);
    }
    if (!__all_sync(~0u, ready)) {
      signal_push();  // before waiting, since a peer may wait for it
      if (Recorder::kOn) ok = wait_own_tiles(n_chunk);
      recorder.begin_wait();
      for (int i = lane_; i < num_addends_ && ok; i += 32) {
        const int row = s_.rows[i];
        ok = row < 0 ? wait_partial(i, n_chunk) : wait_tile(row / BLOCK_M, n_chunk);
      }
      ok = __all_sync(~0u, ok);
      recorder.end_wait(kWaitPartialsReady, -1, n_chunk);
    }
    float weights[kAddendsPerLane];  // all loads in flight at once
#pragma unroll
    for (int j = 0; j < kAddendsPerLane; ++j) {
      const int i = lane_ + 32 * j, row = i < num_addends_ ? s_.rows[i] : -1;
      weights[j] = row >= 0 && p_.weighted ? p_.row_weight[row] : 1.0f;
    }
#pragma unroll
    for (int j = 0; j < kAddendsPerLane; ++j) {
      if (lane_ + 32 * j < num_addends_) s_.weights[lane_ + 32 * j] = weights[j];
    }
    fence_proxy_async();  // bulk loads of the addends follow
    __syncwarp();         // orders every lane's acquire before all lanes' loads
    return ok;
  }
  // With TRACE only: waits for this rank's tiles first, so that the trace shows the two waits
  // apart.
  __device__ bool wait_own_tiles(int n_chunk) {
    bool ok = true;
    recorder.begin_wait();
    for (int i = lane_; i < num_addends_ && ok; i += 32) {
      if (s_.rows[i] >= 0) ok = wait_tile(s_.rows[i] / BLOCK_M, n_chunk);
    }
    ok = __all_sync(~0u, ok);
    recorder.end_wait(kWaitTileDone, -1, n_chunk);
    return ok;
  }
  __device__ const u32* done_flag(int tile, int n_chunk) const {
    return &p_.tile_done[tile * p_.num_n_chunks + n_chunk];
  }
  __device__ u32 done_count(int n_chunk) const {
    return kSignalsPerTile * ((end(n_chunk) - begin(n_chunk) + BLOCK_N - 1) / BLOCK_N);
  }
  __device__ bool tile_is_done(int tile, int n_chunk) const {
    return load_acquire_gpu(done_flag(tile, n_chunk)) >= done_count(n_chunk);
  }
  __device__ bool wait_tile(int tile, int n_chunk) const {
    const u32* done = done_flag(tile, n_chunk);
    return wait_until(p_.world, {kTileDone, p_.world.rank, tile, n_chunk}, s_.epoch,
                      done_count(n_chunk), [&] { return load_acquire_gpu(done); });
  }
  __device__ const u64* ready_flag(int addend, int n_chunk, int* contributor, int* block) const {
    const int d = __float_as_int(s_.weights[addend]), me = p_.world.rank;
    *contributor = (me + d) % p_.world.size;
    *block = (~s_.rows[addend] - p_.staging_base[d]) / s_.block_tokens;
    return p_.partials_ready(me, *contributor, *block) + n_chunk;
  }
  __device__ bool partial_is_ready(int addend, int n_chunk) const {
    int contributor, block;
    return acquire(ready_flag(addend, n_chunk, &contributor, &block)) >= s_.epoch;
  }
  __device__ bool wait_partial(int addend, int n_chunk) const {
    int contributor, block;
    const u64* flag = ready_flag(addend, n_chunk, &contributor, &block);
    return wait_until(
        p_.world, {kPartialsReady, contributor, block, n_chunk}, s_.epoch, s_.epoch,
        [&] { return acquire(flag); }, LATE ? kLatePatience + 2 : 1);
  }

  const EmulatedLink& link_;
};

}  // namespace cometrt
