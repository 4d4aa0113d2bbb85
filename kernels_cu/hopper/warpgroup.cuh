// PTX wrappers for warpgroups: register reallocation (setmaxnreg) and stmatrix.
#pragma once

#include "hopper/mbarrier.cuh"

namespace cometrt {

// Both by all threads of a warpgroup, once, before its role begins.
template <int kRegisters>
__device__ inline void register_dealloc() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ inline void register_alloc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// A warp stores four 8 x 8 matrices of 16-bit values to shared memory. `row`: in lane l, the
// address of row l % 8 of matrix l / 8. m_i: of matrix i, row lane / 4, columns 2 * (lane % 4) and
// the next.
__device__ inline void store_matrices(void* row, u32 m0, u32 m1, u32 m2, u32 m3) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
      "r"(m0), "r"(m1), "r"(m2), "r"(m3)
      : "memory");
}

}  // namespace cometrt
