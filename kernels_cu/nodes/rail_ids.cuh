// Ids as they cross between nodes.
#pragma once

#include "nodes/rail_params.cuh"

namespace cometrt {

// Ids of rail_choose. A pair that breaks a rule has kWrongPair minus its number among the pairs of
// its rank. If a node wants more tokens than may cross, the rank's first pair has the id of its
// first pair that breaks a rule, or else kTooMany plus how many the node wants. As in
// cometrt/nodes/cuda.py.
constexpr int kNotHere = -1, kWrongPair = -2, kTooMany = -2147483647 - 1, kMostWanted = 1 << 30;
constexpr int kNoWrongPair = 2147483647;
// Without rail_choose, an id that breaks a rule on every node.
constexpr int kNoExpert = 2147483647;

// This rank's id of a pair. One beyond int32 stays out of range; it must not wrap.
__device__ inline int id_of(const RailParams& params, long long pair) {
  if (params.id_bytes == 4) return static_cast<const int*>(params.ids)[pair];
  const long long id = static_cast<const long long*>(params.ids)[pair];
  return static_cast<int>(max(-2147483648ll, min(2147483647ll, id)));
}

}  // namespace cometrt
