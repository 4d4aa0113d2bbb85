// Sums of rows by one warp, the base of CombineWarp. The warp lists the addends of a batch of up to
// 32 tokens. Bulk loads bring their rows through a pipeline of stages in shared memory. The warp
// adds them in fp32 and stores each token's sum. It synchronises only its own lanes; the caller
// waits for flags.
#pragma once

#include "common/packed_rows.cuh"
#include "gemm/roles.cuh"
#include "hopper/bulk.cuh"
#include "protocol/exchange_params.cuh"
#include "protocol/late_parts.cuh"

#ifndef LATE
#define LATE 0
#endif

namespace cometrt {

constexpr int kNoTicket = 0x7fffffff;
constexpr int kSumColumns = 1024;                 // columns of a row in a stage
constexpr int kSumStages = 3, kRowsPerStage = 2;  // one stage is added while the others load
constexpr int kVectors = kSumColumns / 256;       // 16-byte vectors of a row, per lane
constexpr int kVectorsAhead = TRACE ? 2 : 3;  // read ahead from a stage; a trace needs registers
constexpr int kMaxAddends = COMETRT_MAX_ADDENDS;  // of a batch; a token has at most topk + ranks
constexpr int kAddendsPerLane = kMaxAddends / 32;
constexpr int kRowsAtOnce = 8;  // row indices of a token that are loaded at once

struct TokenEnd {
  int addend, token;  // `addend`: one past the token's last addend
};

// A pushed block in flight: the flag to signal at the end of its transfer, or null.
struct SentBlock {
  u64* flag;
  u64 transferred_ns;
};

// Shared memory of one combine warp. It also holds rarely used state, since registers hold the
// sums.
struct alignas(128) CombineStages {
  __nv_bfloat16 values[kSumStages][kRowsPerStage][kSumColumns];
  u64 full[kSumStages];  // completed by the rows' bulk loads; the loading lane of each row arrives
  // Addends of a batch, token by token. rows: a row of partial_rows, or ~staging row. weights: its
  // weight, or the contributor's ring distance until wait_addends(). ends: of tokens with addends.
  int rows[kMaxAddends];
  float weights[kMaxAddends];
  TokenEnd ends[32 + 1];
  SentBlock summed, pushed;  // current block, and the last one, not signalled yet; lane 0 only
  u64 epoch;
  int block_tokens;  // of the plan
  int block, list;   // popped block, and its queue (lane 0 only)
#if LATE
  // Lane 0 alone: the turn of run_by_parts(); the end of pushes, by turn; a ticket of a later turn,
  // by queue, or -1.
  int turn, turn_ends[kMaxLateParts], kept[2];
#endif

  // By one thread. mbarrier_init_fence must follow.
  __device__ void init() {
    for (u64& barrier : full) mbarrier_init(&barrier, kRowsPerStage);
    pushed.flag = nullptr;
  }
};

// Position of a stage row in the sequence of loads: for each range of kSumColumns columns, all
// addends in the order of the list.
struct SumCursor {
  int addend, column;

  __device__ void advance(int copies, int num_addends) {
    for (addend += copies; addend >= num_addends; addend -= num_addends) column += kSumColumns;
  }
};

// The sums of one combine warp. All lanes run converged.
class RowSums {
 protected:
  __device__ RowSums(const ExchangeParams& p, CombineStages& stages)
      : p_(p), s_(stages), lane_(threadIdx.x % 32) {}

  __device__ int begin(int n_chunk) const { return n_chunk * p_.n_chunk_columns; }
  __device__ int end(int n_chunk) const { return min(begin(n_chunk + 1), p_.g.hidden); }

  // Lists the addends of a batch, a token a lane (-1: none): its rows on this rank in the order of
  // k, then its staging rows by ring distance, if `staging_rows` [ranks] is not null. Returns the
  // number of tokens that fitted.
  __device__ int list_addends(int token, const int* staging_rows) {
    const int* rows = p_.pair_row + static_cast<long long>(token) * p_.g.topk;
    const int topk = token >= 0 ? p_.g.topk : 0;
    const int ranks = token >= 0 && staging_rows != nullptr ? p_.world.size : 0;
    int first[kRowsAtOnce], count = 0;
#pragma unroll
    for (int k = 0; k < kRowsAtOnce; ++k) first[k] = k < topk ? rows[k] : -1;
#pragma unroll 4
    for (int d = 1; d < ranks; ++d) count += staging_rows[d] >= 0;
#pragma unroll 4
    for (int k = kRowsAtOnce; k < topk; ++k) count += rows[k] >= 0;
#pragma unroll
    for (int k = 0; k < kRowsAtOnce; ++k) count += first[k] >= 0;
    int at = count;
    for (int step = 1; step < 32; step *= 2) {
      const int left = __shfl_up_sync(~0u, at, step);
      if (lane_ >= step) at += left;
    }
    const u32 listed = __ballot_sync(~0u, token >= 0 && at <= kMaxAddends);  // a prefix
    const u32 some = __ballot_sync(~0u, count > 0) & listed;
    const int tokens = __popc(listed);
    num_addends_ = __shfl_sync(~0u, at, tokens - 1);
    empty_ = listed & ~some;
    if (lane_ < tokens && count > 0) {
      s_.ends[__popc(some & ((1u << lane_) - 1))] = {at, lane_};
      at -= count;
#pragma unroll
      for (int k = 0; k < kRowsAtOnce; ++k) {
        if (first[k] >= 0) s_.rows[at++] = first[k];
      }
#pragma unroll 1
      for (int k = kRowsAtOnce; k < topk; ++k) {
        if (rows[k] >= 0) s_.rows[at++] = rows[k];
      }
#pragma unroll 1
      for (int d = 1; d < ranks; ++d) {
        if (staging_rows[d] < 0) continue;
        s_.weights[at] = __int_as_float(d);
        s_.rows[at++] = ~staging_rows[d];
      }
    }
    __syncwarp();
    return tokens;
  }

  // Sums the listed addends over the N-chunk's columns and stores them in `to` [tokens, hidden].
  __device__ void sum_batch(int n_chunk, __nv_bfloat16* to) {
    const int first = begin(n_chunk), last = end(n_chunk);
    store_zeros(to, first, last);
    const int copies = (last - first + kSumColumns - 1) / kSumColumns * num_addends_;
    if (copies == 0) return;
    SumCursor ahead{0, first};  // this lane's next row to load
    ahead.advance(lane_ % kRowsPerStage, num_addends_);
#pragma unroll 1
    for (int i = 0; i < kSumStages; ++i) {
      load((state_.stage + i) % kSumStages, ahead, copies - kRowsPerStage * i, last);
    }
    float sum[kVectors][8] = {};
    int addend = 0, column = first + 8 * lane_, token = 0;
    TokenEnd end = s_.ends[0];
    const auto end_addend = [&] {
      if (++addend < end.addend) return;
      __nv_bfloat16* row =
          to + (static_cast<u64>(static_cast<u32>(end.token)) * static_cast<u32>(p_.g.hidden) +
                static_cast<u32>(column));
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        if (column + 256 * i < last) store_row(row + 256 * i, sum[i]);
#pragma unroll
        for (float& value : sum[i]) value = 0;
      }
      ++token;
      if (addend == num_addends_) addend = 0, token = 0, column += kSumColumns;
      end = s_.ends[token];
    };
#pragma unroll 1
    for (int left = copies; left > 0; left -= kRowsPerStage) {
      // Vectors past the last column, or of a row that was not loaded, go into sums that are not
      // stored.
      uint4 vectors[kVectorsAhead];  // read-ahead from shared memory
      const float weights[] = {s_.weights[addend],
                               s_.weights[addend + 1 < num_addends_ ? addend + 1 : 0]};
      mbarrier_wait(&s_.full[state_.stage], state_.parity);
      const uint4* values = reinterpret_cast<const uint4*>(s_.values[state_.stage]) + lane_;
#pragma unroll
      for (int i = 0; i < kVectorsAhead; ++i) vectors[i] = values[32 * i];
      const auto add = [&](int i) {
        add_packed(sum[i % kVectors], vectors[i % kVectorsAhead], weights[i / kVectors]);
        const int next = i + kVectorsAhead;
        if (next < kRowsPerStage * kVectors) vectors[i % kVectorsAhead] = values[32 * next];
      };
#pragma unroll
      for (int i = 0; i < kVectors; ++i) add(i);
      end_addend();
#pragma unroll
      for (int i = kVectors; i < kRowsPerStage * kVectors; ++i) {
        if (i + kVectorsAhead == kRowsPerStage * kVectors) {
          __syncwarp();  // all lanes have read the stage: refill it
          load(state_.stage, ahead, left - kSumStages * kRowsPerStage, last);
          state_.advance();
        }
        add(i);
      }
      if (left > 1) end_addend();
    }
    __syncwarp();  // all lanes have read the list
  }

  // For tokens of the batch without addends.
  __device__ void store_zeros(__nv_bfloat16* to, int first, int last) const {
    const float zeros[8] = {};
    for (u32 left = empty_; left != 0; left &= left - 1) {
      __nv_bfloat16* row = to + static_cast<long long>(__ffs(left) - 1) * p_.g.hidden;
      for (int i = first + 8 * lane_; i < last; i += 256) store_row(row + i, zeros);
    }
  }

  // Refills a stage, by one lane a row. `left`: rows left to load. A lane without a row only
  // arrives.
  __device__ void load(int stage, SumCursor& of, int left, int last) {
    if (lane_ >= kRowsPerStage || left <= 0) return;
    u64* full = &s_.full[stage];
    if (lane_ >= left) {
      mbarrier_arrive(full);
      return;
    }
    const int row = s_.rows[of.addend];
    const __nv_bfloat16* from =
        row >= 0 ? p_.partial_rows : p_.data<__nv_bfloat16>(p_.world.rank, p_.staging_offset);
    from +=
        static_cast<u64>(static_cast<u32>(row >= 0 ? row : ~row)) * static_cast<u32>(p_.g.hidden) +
        static_cast<u32>(of.column);
    const u32 bytes = 2 * min(kSumColumns, last - of.column);
    mbarrier_arrive_expect(full, bytes);
    bulk_load<CacheHint::kEvictFirst>(s_.values[stage][lane_], from, bytes, full);
    of.advance(kRowsPerStage, num_addends_);
  }

  const ExchangeParams& p_;
  CombineStages& s_;
  int lane_, num_addends_ = 0;

 private:
  u32 empty_ = 0;                    // bit mask of the batch's tokens without addends
  PipelineState<kSumStages> state_;  // continues across batches
};

}  // namespace cometrt
