// The epilogues of weight gradients: bf16 or float32, written or added to what is there. Each
// element has one writer, so that results are the same in every run.
#pragma once

#include "gemm/epilogue.cuh"
#include "gemm/roles.cuh"
#include "gemm/wgrad_problem.cuh"

namespace cometrt {

// out = d, of the rows of out[expert]. A warp's rows all exist, or none of them.
struct OverwriteBf16 {
  static constexpr int kColumns = BLOCK_N, kSteps = 1;

  __device__ static void store(int, u32* pairs, SubtileStore& subtile, const WgradProblem& problem,
                               int expert, long long row, int column) {
    if (row >= problem.num_rows) return;
    __nv_bfloat16* out = static_cast<__nv_bfloat16*>(problem.out);
    const long long out_row = static_cast<long long>(expert) * problem.num_rows + row;
    subtile.store(pairs, out + out_row * problem.num_columns + column, problem.num_columns - column,
                  problem.num_columns);
  }
};

// For launches of which all results are bf16 and overwritten: the epilogue of the other GEMMs.
using Bf16WgradEpilogue = Epilogue<OverwriteBf16, NoSignal, WgradParams>;

// threadIdx.x, read again at each use, so that no value derived from it takes a register.
__device__ inline u32 thread() { return thread_index(); }

// A box of a warp's results, as the bulk engine copies it: 16 rows of 128 bytes, swizzled. These
// are 32 float32 columns or 64 bf16 columns.
struct alignas(1024) OutBox {
  static constexpr int kRows = kHalfM / 4, kRowBytes = 128, kHalfBytes = kRows / 2 * kRowBytes;
  char bytes[kRows * kRowBytes];

  // The bytes of row r lie in row 2 * (r % 4) + r / 4 of their half, by the map's order of rows.
  // Then half a warp writes the float32 pairs of its four rows without bank conflicts.
  __device__ static u32 row_offset(u32 vector, u32 byte) {
    const u32 r = thread() % 32 / 4, row = 2 * (r % 4) + r / 4;
    return row * kRowBytes + 16 * (vector ^ row) + byte;
  }
  // `v` [16]: this thread's accumulators of 32 columns.
  __device__ void put_float32(const float* v) {
    const u32 lane = thread() % 4, first = row_offset(lane / 2, lane % 2 * 8);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      char* lower = bytes + (first ^ 32 * i);
      *reinterpret_cast<float2*>(lower) = make_float2(v[4 * i], v[4 * i + 1]);
      *reinterpret_cast<float2*>(lower + kHalfBytes) = make_float2(v[4 * i + 2], v[4 * i + 3]);
    }
  }
  // `v` [32]: this thread's accumulators of 64 columns. They are added to the values in the box, or
  // replace them. Either way they are rounded once.
  __device__ void put_bf16(const float* v, bool add) {
    const u32 first = row_offset(0, thread() % 4 * 4);
#pragma unroll
    for (int upper = 0; upper < 2; ++upper) {
      char* half = bytes + upper * kHalfBytes;
      u32 old[8] = {};
      if (add) {
#pragma unroll
        for (int i = 0; i < 8; ++i) old[i] = *reinterpret_cast<u32*>(half + (first ^ 16 * i));
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float2 pair = unpack(old[i]);
        const float* d = v + 4 * i + 2 * upper;
        *reinterpret_cast<u32*>(half + (first ^ 16 * i)) = pack(pair.x + d[0], pair.y + d[1]);
      }
    }
  }
};

// Two boxes for each multiplying warp. Four of them lie in epilogue_tiles, which only
// Bf16WgradEpilogue uses.
struct WgradShared : Shared {
  u64 old_full[4 * kWarpgroups];  // of a warp: the old values of two boxes have arrived
  OutBox boxes[6 * kWarpgroups];

  __device__ OutBox* box(int warp, int index) {
    if (index == 0) return &boxes[warp];
    return warp < 4 ? reinterpret_cast<OutBox*>(epilogue_tiles) + warp : &boxes[4 + warp];
  }
};
static_assert(sizeof(WgradShared) <= 227 * 1024, "shared memory of an SM");
static_assert(sizeof(Shared::epilogue_tiles) >= 4 * sizeof(OutBox), "second boxes of four warps");

// For all other launches. Results leave by the bulk engine, box by box: the first half of a tile's
// columns at its end, the second under the next tile's main loop, from float32 in registers.
// float32 results are added by the bulk engine. bf16 results are added here before their only
// rounding: their old values are loaded into the boxes ahead of time.
class BoxEpilogue {
 public:
  static constexpr int kSteps = 8, kUnrolledSteps = kSteps;

  __device__ BoxEpilogue(WgradShared& shared, const WgradParams& p, const WgradMaps& maps)
      : shared_(shared), p_(p), maps_(maps) {}

  // Before the main loop of a tile, whose last step loads the old values of its first boxes.
  __device__ void expect(const WorkTile& tile) { expected_ = tile, is_expected_ = true; }
  // Sends the first half of a tile's columns and keeps the second.
  __device__ void stash(const WorkTile& tile, const float (&d)[128]) {
    stored_ = place_of(tile);
    if (stored_.row_group < 0) return;
    if (is_float32(stored_)) {
#pragma unroll
      for (int box = 0; box < 4; ++box) send_float32(d + 16 * box, box);
    } else {
      claim_bf16();
#pragma unroll
      for (int box = 0; box < 2; ++box) send_bf16(d + 32 * box, box);
    }
#pragma unroll
    for (int i = 0; i < 64; ++i) stash_[i] = d[64 + i];
  }
  // Of an expert without rows; no such tile is accumulated.
  __device__ void stash_zeros(const WorkTile& tile) {
    const float zeros[128] = {};
    stash(tile, zeros);
  }

  // One step of the stashed tile, if there is one. `index`: a constant after unrolling. float32
  // boxes leave in the odd steps. bf16: step 1 loads the old values of the last two boxes, which
  // leave in steps 3 and 5.
  __device__ void store_step(int index) {
    if (stored_.row_group >= 0 && index % 2 == 1) {
      const int half_step = index / 2;
      if (is_float32(stored_)) {
        send_float32(stash_ + 16 * half_step, 4 + half_step);
      } else if (half_step == 0) {
        if (p_.accumulate) load_old(stored_, 2);
      } else if (half_step < 3) {
        if (half_step == 1) claim_bf16();
        send_bf16(stash_ + 32 * (half_step - 1), 1 + half_step);
      }
    }
    if (index < kSteps - 1) return;
    stored_.row_group = -1;
    if (is_expected_ && p_.accumulate) {
      const Place at = place_of(expected_);
      if (at.row_group >= 0 && !is_float32(at)) load_old(at, 0);
    }
    is_expected_ = false;
  }
  // All steps of the stashed tile.
  __device__ void flush() {
#pragma unroll
    for (int index = 0; index < kSteps; ++index) store_step(index);
  }
  // After the last tile: until its results are in global memory.
  __device__ void finish() { bulk_wait<0>(); }

 private:
  // Of this warp's rows of a tile in out, by its map.
  struct Place {
    int row_group = -1;  // eight rows each; -1: the warp has no rows
    u32 n_tile : 31, kind : 1;
  };

  // Among the multiplying warps.
  __device__ static int warp() { return thread() / 32 - kFirstMultiplyWarp; }
  __device__ Place place_of(const WorkTile& tile) const {
    const u32 kind = tile.kind();
    const int num_rows = p_.problems[kind].num_rows;
    const int row = tile.m_tile * BLOCK_M + warp() * OutBox::kRows;
    const bool exists = tile.m_tile >= 0 && row < num_rows;
    return {exists ? (tile.expert * num_rows + row) / 8 : -1, static_cast<u32>(tile.n_tile), kind};
  }
  __device__ bool is_float32(const Place& at) const { return p_.problems[at.kind].is_float32; }

  // Both boxes of the warp: their old values have arrived, or nothing reads them any more.
  __device__ void claim_bf16() {
    if (p_.accumulate) {
      mbarrier_wait(&shared_.old_full[warp()], parity_);
      parity_ ^= 1;
    } else {
      bulk_wait_read<0>();
      __syncwarp();
    }
  }
  __device__ void send_float32(const float* v, int box) {
    bulk_wait_read<1>();  // only the other box may still be read
    __syncwarp();
    shared_.box(warp(), box % 2)->put_float32(v);
    send(box, 32, p_.accumulate);
  }
  __device__ void send_bf16(const float* v, int box) {
    shared_.box(warp(), box % 2)->put_bf16(v, p_.accumulate);
    send(box, 64, false);
  }
  // A box of the stashed tile. The map leaves out columns that do not exist.
  __device__ void send(int box, int box_columns, bool add) {
    fence_proxy_async_shared();
    __syncwarp();
    if (thread() % 32 == 0) {
      const TensorMap* map = &maps_.out[stored_.kind];
      const OutBox* from = shared_.box(warp(), box % 2);
      const int column = stored_.n_tile * BLOCK_N + box * box_columns;
      if (add) {
        tensor_add_4d(map, from, column, 0, 0, stored_.row_group);
      } else {
        tensor_store_4d(map, from, column, 0, 0, stored_.row_group);
      }
      bulk_commit();
    }
  }
  // Loads the old values of two bf16 boxes into both boxes of the warp.
  __device__ void load_old(const Place& at, int first_box) {
    if (thread() % 32 == 0) {
      bulk_wait_read<0>();
      u64* full = &shared_.old_full[warp()];
      mbarrier_arrive_expect(full, 2 * sizeof(OutBox));
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int column = at.n_tile * BLOCK_N + (first_box + i) * 64;
        tensor_load_4d(shared_.box(warp(), i), &maps_.out[at.kind], column, 0, 0, at.row_group,
                       full, cache_policy<CacheHint::kEvictFirst>());
      }
    }
  }

  WgradShared& shared_;
  const WgradParams& p_;
  const WgradMaps& maps_;
  u32 parity_ = 0;
  float stash_[64];
  Place stored_;       // the stashed tile
  WorkTile expected_;  // the next one, until its old values are loaded
  bool is_expected_ = false;
};

}  // namespace cometrt
