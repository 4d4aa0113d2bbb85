// Reads of a caller's arrays, whatever their dtype, and reductions over a warp and a block.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "hopper/memory.cuh"
#include "router/params.cuh"

namespace cometrt {

__device__ inline int lane_index() { return threadIdx.x % 32; }

__device__ inline double warp_max(double value) {
  for (int step = 16; step > 0; step /= 2) {
    value = fmax(value, __shfl_xor_sync(~0u, value, step));
  }
  return value;
}

__device__ inline double warp_sum(double value) {
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(~0u, value, step);
  return value;
}

// Over a block of 1,024 threads, on all of them. warps [32]: in shared memory.
__device__ inline double block_sum(double value, double* warps) {
  value = warp_sum(value);
  __syncthreads();  // an earlier reduction may still read
  if (lane_index() == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  return warp_sum(warps[lane_index()]);
}

__device__ inline double block_max(double value, double* warps) {
  value = warp_max(value);
  __syncthreads();
  if (lane_index() == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  return warp_max(warps[lane_index()]);
}

__device__ inline double to_double(float value) { return value; }
__device__ inline double to_double(double value) { return value; }
__device__ inline double to_double(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ inline double to_double(__half value) { return __half2float(value); }

__device__ inline double load_element(const void* array, int type, long long index) {
  switch (type) {
    case kFloat32:
      return to_double(static_cast<const float*>(array)[index]);
    case kFloat64:
      return to_double(static_cast<const double*>(array)[index]);
    case kBfloat16:
      return to_double(static_cast<const __nv_bfloat16*>(array)[index]);
    default:
      return to_double(static_cast<const __half*>(array)[index]);
  }
}

// Also of the types of integers.
__device__ inline double load_number(const void* array, int type, long long index) {
  if (type == kInt32) return static_cast<const int*>(array)[index];
  if (type == kInt64) return static_cast<double>(static_cast<const long long*>(array)[index]);
  return load_element(array, type, index);
}

__device__ inline void store_element(void* array, int type, long long index, double value) {
  switch (type) {
    case kFloat32:
      static_cast<float*>(array)[index] = static_cast<float>(value);
      break;
    case kFloat64:
      static_cast<double*>(array)[index] = value;
      break;
    case kBfloat16:
      static_cast<__nv_bfloat16*>(array)[index] = __float2bfloat16(static_cast<float>(value));
      break;
    default:
      static_cast<__half*>(array)[index] = __double2half(value);
  }
}

__device__ inline long long load_id(const RouterParams& p, long long index) {
  return p.ids_are_64 ? static_cast<const long long*>(p.ids)[index]
                      : static_cast<const int*>(p.ids)[index];
}

}  // namespace cometrt
