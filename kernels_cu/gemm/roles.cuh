// The roles of a CTA's warps, and their registers.
#pragma once

#include "gemm/tile.cuh"

namespace cometrt {

// The warps of the first warpgroup. All others multiply.
enum Role : int { kLoadWarp, kSchedulerWarp, kFirstCommWarp, kSecondCommWarp };
constexpr int kCommWarps = 2, kFirstMultiplyWarp = 4;

// Registers of a thread, in the first warpgroup and in those that multiply.
template <int kFirst, int kMultiply>
struct RegisterBudget {
  static constexpr int kOfFirst = kFirst, kOfMultiply = kMultiply;
  static_assert(128 * (kFirst + kWarpgroups * kMultiply) <= 64 * 1024, "registers of an SM");
  static_assert(kFirst % 8 == 0 && kMultiply % 8 == 0, "setmaxnreg takes multiples of 8");
};

}  // namespace cometrt
