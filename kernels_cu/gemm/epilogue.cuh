// From a warpgroup's accumulators to the results: activation, rounding, 64 columns at a time
// through shared memory to a tensor store, which clips what lies beyond the matrix.
#pragma once

#include "common/activation.cuh"
#include "gemm/tile.cuh"
#include "hopper/bulk.cuh"
#include "hopper/warpgroup.cuh"

namespace cometrt {

__device__ inline u32 pack(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const u32*>(&pair);
}

__device__ inline float2 unpack(u32 pair) {
  return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&pair));
}

// One warp's way out: 16 rows, 64 columns at a time.
class SlabStore {
 public:
  __device__ explicit SlabStore(Slab (&slabs)[kSlabsInFlight]) : slabs_(slabs) {}

  // `pairs` [16]: eight columns after the other, this thread's two values of row r, then of r + 8,
  // as the accumulators have them. To columns [column, column + 64) of part `part`, from `row` on.
  __device__ void store(const u32 (&pairs)[16], const TensorMap* map, int column, int part,
                        int row) {
    const int lane = threadIdx.x % 32;
    char* slab = reinterpret_cast<char*>(slabs_[next_].values);
    if (lane == 0) bulk_wait_read<kSlabsInFlight - 1>();
    __syncwarp();  // the slab's last store has left it
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // 16 columns: chunks 2 i and 2 i + 1 of 16 bytes, swizzled
      const int chunk = (2 * i + lane / 16) ^ (lane % 8);
      store_matrices(slab + lane % 16 * 128 + 16 * chunk, pairs[4 * i], pairs[4 * i + 1],
                     pairs[4 * i + 2], pairs[4 * i + 3]);
    }
    fence_proxy_async_shared();
    __syncwarp();  // all of the slab is there
    if (lane == 0) {
      tensor_store_3d(map, slab, column, part, row);
      bulk_commit();
    }
    next_ ^= 1;
  }

  // What was stored is complete, and its slabs are free.
  __device__ void finish() {
    if (threadIdx.x % 32 == 0) bulk_wait<0>();
  }

 private:
  Slab (&slabs_)[kSlabsInFlight];
  int next_ = 0;
};
static_assert(kSlabsInFlight == 2);

// `kActivation` -1: out = d. Else out = act(d), and z = d where `kWriteZ`; out is computed from the
// rounded z, so that backward finds the same bits.
template <int kActivation, bool kWriteZ, typename Hooks>
class Epilogue {
  static constexpr bool kActivates = kActivation >= 0, kGated = kActivates && is_gated(kActivation);
  static constexpr int kColumns = kGated ? kHalfN : BLOCK_N;  // of out in a tile

 public:
  // `warp` counts those that multiply.
  __device__ Epilogue(Shared& shared, int warp, const TensorMap* out_map, const TensorMap* z_map,
                      const Hooks& hooks)
      : slabs_(shared.slabs[warp]), warp_(warp), out_map_(out_map), z_map_(z_map), hooks_(hooks) {}

  __device__ void store(const WorkItem& item, const float (&d)[128]) {
    const int row = item.tile * BLOCK_M + warp_ * kSlabRows, column = item.column * kColumns;
#pragma unroll
    for (int slab = 0; slab < kColumns / kSlabColumns; ++slab) {
      u32 first[16], second[16];
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        const int at = 32 * slab + 2 * i;
        first[i] = pack(d[at], d[at + 1]);
        if (kGated) second[i] = pack(d[64 + at], d[64 + at + 1]);
      }
      const int begin = column + slab * kSlabColumns;
      if (kActivates && kWriteZ) slabs_.store(first, z_map_, begin, 0, row);
      if (kGated && kWriteZ) slabs_.store(second, z_map_, begin, 1, row);
      if (kActivates) {
#pragma unroll
        for (int i = 0; i < 16; ++i) first[i] = activate(first[i], kGated ? second[i] : 0);
      }
      slabs_.store(first, out_map_, begin, 0, row);
    }
    hooks_.after_stores(item);
  }

  __device__ void finish() { slabs_.finish(); }

 private:
  __device__ static u32 activate(u32 gate, u32 up) {
    const float2 g = unpack(gate), u = unpack(up);
    const float low = activation_of(kActivation, g.x).value;
    const float high = activation_of(kActivation, g.y).value;
    return kGated ? pack(low * u.x, high * u.y) : pack(low, high);
  }

  SlabStore slabs_;
  int warp_;
  const TensorMap *out_map_, *z_map_;
  const Hooks& hooks_;
};

}  // namespace cometrt
