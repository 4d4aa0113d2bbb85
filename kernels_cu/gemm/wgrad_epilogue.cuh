// The epilogues of weight gradients. Results are bf16 or float32, and overwrite or are added to the
// old values. Each element has one writer, so results repeat bit for bit.
#pragma once

#include "gemm/epilogue.cuh"
#include "gemm/roles.cuh"
#include "gemm/wgrad_problem.cuh"

namespace cometrt {

// out[expert] = d, rounded to bf16. Of a warp's rows all exist, or none.
struct OverwriteBf16 {
  static constexpr int kColumns = BLOCK_N, kSteps = 1;

  __device__ static void store(int, u32* pairs, SubtileStore& subtile, const WgradProblem& problem,
                               int expert, long long row, int column, int) {
    if (row >= problem.num_rows) return;
    __nv_bfloat16* out = static_cast<__nv_bfloat16*>(problem.out);
    const long long out_row = static_cast<long long>(expert) * problem.num_rows + row;
    subtile.store(pairs, out + out_row * problem.num_columns + column, problem.num_columns - column,
                  problem.num_columns);
  }
};

// For launches whose results are all bf16 and overwritten: the epilogue that the other GEMMs have.
using Bf16WgradEpilogue = Epilogue<OverwriteBf16, NoSignal, WgradParams>;

// threadIdx.x, read again at each use, so that no value derived from it takes a register.
__device__ inline u32 thread() { return thread_index(); }

// A box of a warp's results, as TMA copies it: 16 rows of 128 bytes, swizzled. A row has 32 float32
// columns or 64 bf16 columns.
struct alignas(1024) OutBox {
  static constexpr int kRows = kHalfM / 4, kRowBytes = 128, kHalfBytes = kRows / 2 * kRowBytes;
  char bytes[kRows * kRowBytes];

  // Each half of a box has eight rows, in the order of the tensor map: row r lies at
  // 2 * (r % 4) + r / 4. So half a warp writes the float32 pairs of its four rows without bank
  // conflicts.
  __device__ static u32 row_offset(u32 vector, u32 byte) {
    const u32 r = thread() % 32 / 4, row = 2 * (r % 4) + r / 4;
    return row * kRowBytes + 16 * (vector ^ row) + byte;
  }
  // `v` [16]: this thread's accumulators of 32 columns. They are added to the values in the box, or
  // replace them.
  __device__ void put_float32(const float* v, bool add) {
    const u32 first = row_offset(thread() % 4 / 2, thread() % 2 * 8);
#pragma unroll
    for (int upper = 0; upper < 2; ++upper) {
      char* half = bytes + upper * kHalfBytes;
      float2 sums[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* d = v + 4 * i + 2 * upper;
        sums[i] = make_float2(d[0], d[1]);
      }
      if (add) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float2 old = *reinterpret_cast<float2*>(half + (first ^ 32 * i));
          sums[i] = make_float2(old.x + sums[i].x, old.y + sums[i].y);
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) *reinterpret_cast<float2*>(half + (first ^ 32 * i)) = sums[i];
    }
  }
  // `v` [16]: the values of the box, where put_float32 writes them.
  __device__ void get_float32(float* v) const {
    const u32 first = row_offset(thread() % 4 / 2, thread() % 2 * 8);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const char* half = bytes + i % 2 * kHalfBytes;
      const float2 pair = *reinterpret_cast<const float2*>(half + (first ^ i / 2 * 32));
      v[2 * i] = pair.x, v[2 * i + 1] = pair.y;
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

// Where a warp's rows of a tile lie in out, as its tensor map counts them.
struct OutRows {
  int row_group;  // the first one, of eight rows each; -1: the warp has no rows
  u32 n_tile : 31, kind : 1;
};

// Two boxes for each multiplying warp. Four of the boxes lie in epilogue_tiles, which only
// Bf16WgradEpilogue uses otherwise.
struct WgradShared : Shared {
  u64 old_full[4 * kWarpgroups];      // per warp: the old values of two boxes have arrived
  OutRows expected[4 * kWarpgroups];  // per warp: its rows of the tile that is being multiplied
  OutBox boxes[6 * kWarpgroups];

  __device__ OutBox* box(int warp, int index) {
    if (index == 0) return &boxes[warp];
    return warp < 4 ? reinterpret_cast<OutBox*>(epilogue_tiles) + warp : &boxes[4 + warp];
  }
};
static_assert(sizeof(WgradShared) <= kMaxSharedBytes, "shared memory of a CTA");
static_assert(sizeof(Shared::epilogue_tiles) >= 4 * sizeof(OutBox), "second boxes of four warps");

// For launches with float32 or accumulated results. TMA stores results box by box. The first half
// of a tile's columns leaves at the tile's end. The second half stays in registers as float32, and
// leaves under the next tile's main loop. For accumulated results TMA loads the old values into the
// boxes ahead of time. They are added before the only rounding.
//
// Float32 has eight boxes of 32 columns, in pairs 0 to 3, and a warp has room for one pair. Bf16
// has four boxes of 64 columns, in pairs 0 and 1. In the steps under a main loop, a warp
//   float32: 1 loads old pair 2, 2 sends pair 2, 3 loads old pair 3, 4 sends pair 3;
//            5 loads old pair 0 of the next tile, 6 keeps it in the stash and loads old pair 1;
//   bf16:    1 loads old pair 1, 3 and 4 send its boxes; 6 loads old pair 0 of the next tile.
// So a step hardly waits: the load, or TMA's reads of a box, that it waits for began a step
// earlier. Step 0 does nothing, since TMA still reads the boxes that were sent at the tile's end.
class BoxEpilogue {
 public:
  static constexpr int kSteps = 7, kUnrolledSteps = kSteps;

  __device__ BoxEpilogue(WgradShared& shared, const WgradParams& p, const WgradMaps& maps)
      : shared_(shared), p_(p), maps_(maps) {
    expect_none();
  }

  // Before the main loop of a tile. The last steps of that loop load its first old values.
  __device__ void expect(const WorkTile& tile) {
    if (thread() % 32 == 0) shared_.expected[warp()] = rows_of(tile);
    __syncwarp();
  }
  // Sends the first half of a tile's columns and stashes the second.
  __device__ void stash(const WorkTile&, const float (&d)[128]) {
    take_expected();
    if (stored_.row_group < 0) return;
    if (is_float32(stored_)) {
      send_float32_pair(d + 32, 1, p_.accumulate);
      float first[32];
#pragma unroll
      for (int i = 0; i < 32; ++i) first[i] = p_.accumulate ? stash_[i] + d[i] : d[i];
      send_float32_pair(first, 0, false);
    } else {
      claim_bf16();
#pragma unroll
      for (int box = 0; box < 2; ++box) send_bf16(d + 32 * box, box);
    }
#pragma unroll
    for (int i = 0; i < 64; ++i) stash_[i] = d[64 + i];
  }
  // For a tile without K (its expert has no rows), or of which this warp has no rows. Its results
  // are zero. A list of accumulated gradients has no tile without K.
  __device__ void stash_zeros(const WorkTile& tile) {
    const float zeros[128] = {};
    stash(tile, zeros);
  }

  // One step of the stashed tile, if there is one, or of the tile that is being multiplied.
  // `index`: a constant after unrolling.
  __device__ void store_step(int index) {
    if (index < 5) {
      if (stored_.row_group < 0) return;
      if (is_float32(stored_)) {
        float32_step(index);
      } else {
        bf16_step(index);
      }
    } else {
      stored_.row_group = -1;
      const OutRows next = shared_.expected[warp()];
      if (p_.accumulate && next.row_group >= 0) load_first_old(next, index);
    }
  }
  // All steps of the stashed tile.
  __device__ void flush() {
#pragma unroll
    for (int index = 0; index < kSteps; ++index) store_step(index);
  }
  // After the last tile: waits until all results are in global memory.
  __device__ void finish() { bulk_wait<0>(); }

 private:
  // Index among the multiplying warps.
  __device__ static int warp() { return thread() / 32 - kFirstMultiplyWarp; }
  __device__ OutRows rows_of(const WorkTile& tile) const {
    const u32 kind = tile.kind();
    const int num_rows = p_.problems[kind].num_rows;
    const int row = tile.m_tile * BLOCK_M + warp() * OutBox::kRows;
    const bool exists = tile.m_tile >= 0 && row < num_rows;
    return {exists ? (tile.expert * num_rows + row) / 8 : -1, static_cast<u32>(tile.n_tile), kind};
  }
  __device__ bool is_float32(const OutRows& at) const { return p_.problems[at.kind].is_float32; }

  __device__ void take_expected() {
    stored_ = shared_.expected[warp()];
    __syncwarp();
    expect_none();
  }
  __device__ void expect_none() {
    if (thread() % 32 == 0) shared_.expected[warp()].row_group = -1;
    __syncwarp();
  }

  __device__ void float32_step(int index) {
    if (p_.accumulate && index % 2 == 1) load_old(stored_, 2 + index / 2);
    if (index == 2) send_float32_pair(stash_, 2, p_.accumulate);
    if (index == 4) send_float32_pair(stash_ + 32, 3, p_.accumulate);
  }
  __device__ void bf16_step(int index) {
    if (p_.accumulate && index == 1) load_old(stored_, 1);
    if (index == 3) claim_bf16();
    if (index == 3) send_bf16(stash_, 2);
    if (index == 4) send_bf16(stash_ + 32, 3);
  }
  // Loads the old values of the first half of the next tile's columns, which stash() adds.
  __device__ void load_first_old(const OutRows& at, int index) {
    if (is_float32(at) && index == 6) {
      wait_for_old();
#pragma unroll
      for (int box = 0; box < 2; ++box) {
        shared_.box(warp(), box)->get_float32(stash_ + 16 * box);
      }
      fence_proxy_async_shared();
      __syncwarp();  // all lanes have read the boxes
      load_old(at, 1);
    } else if (is_float32(at) || index == 6) {
      load_old(at, 0);
    }
  }

  // Waits until the old values of both boxes have arrived.
  __device__ void wait_for_old() {
    mbarrier_wait(&shared_.old_full[warp()], parity_);
    parity_ ^= 1;
  }
  // Waits until both boxes of the warp may be written: when their old values have arrived, or when
  // TMA has read what was sent.
  __device__ void claim_bf16() {
    if (p_.accumulate) {
      wait_for_old();
    } else {
      bulk_wait_read<0>();
      __syncwarp();
    }
  }
  // Sends a pair of boxes. `v` [32]: accumulators of 64 columns. `add`: to the old values there.
  __device__ void send_float32_pair(const float* v, int pair, bool add) {
    if (add) wait_for_old();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (!add) {
        bulk_wait_read<1>();  // only the other box may still be read
        __syncwarp();
      }
      shared_.box(warp(), i)->put_float32(v + 16 * i, add);
      send(2 * pair + i, 32);
    }
  }
  // Sends one box. `v` [32]: accumulators of 64 columns.
  __device__ void send_bf16(const float* v, int box) {
    shared_.box(warp(), box % 2)->put_bf16(v, p_.accumulate);
    send(box, 64);
  }
  // Stores a box of the stashed tile by TMA, which leaves out columns that do not exist.
  __device__ void send(int box, int box_columns) {
    fence_proxy_async_shared();
    __syncwarp();
    if (thread() % 32 == 0) {
      const int column = stored_.n_tile * BLOCK_N + box * box_columns;
      tensor_store_4d(&maps_.out[stored_.kind], shared_.box(warp(), box % 2), column, 0, 0,
                      stored_.row_group);
      bulk_commit();
    }
  }
  // Loads the old values of a pair of boxes, once TMA has read what was sent from the warp's boxes.
  __device__ void load_old(const OutRows& at, int pair) {
    if (thread() % 32 == 0) {
      bulk_wait_read<0>();
      u64* full = &shared_.old_full[warp()];
      mbarrier_arrive_expect(full, 2 * sizeof(OutBox));
      const int box_columns = OutBox::kRowBytes / (is_float32(at) ? 4 : 2);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int column = at.n_tile * BLOCK_N + (2 * pair + i) * box_columns;
        tensor_load_4d(shared_.box(warp(), i), &maps_.out[at.kind], column, 0, 0, at.row_group,
                       full, cache_policy<CacheHint::kEvictFirst>());
      }
    }
  }

  WgradShared& shared_;
  const WgradParams& p_;
  const WgradMaps& maps_;
  u32 parity_ = 0;
  float stash_[64];           // the stashed tile's second half; then old values of the next one
  OutRows stored_{-1, 0, 0};  // the stashed tile
};

}  // namespace cometrt
