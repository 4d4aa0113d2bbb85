// Warp specialisation of the engine: which warp has which role, and each role's registers.
#pragma once

#include "gemm/tile.cuh"

namespace cometrt {

// Warps of warpgroup 0. Warpgroups 1 and 2 multiply.
enum Role : int { kLoadWarp, kSchedulerWarp, kFirstCommWarp, kSecondCommWarp };
constexpr int kCommWarps = 2, kFirstMultiplyWarp = 4;

// Registers of a thread in warpgroup 0 and in those that multiply. A kernel chooses by what its
// comm warps need; setmaxnreg moves the registers.
template <int kFirst, int kMultiply>
struct RegisterBudget {
  static constexpr int kFirstWarpgroup = kFirst, kMultiplyWarpgroups = kMultiply;
  static_assert(128 * (kFirst + kWarpgroups * kMultiply) <= 64 * 1024, "registers of an SM");
  static_assert(kFirst % 8 == 0 && kMultiply % 8 == 0, "setmaxnreg takes multiples of 8");
};

}  // namespace cometrt
