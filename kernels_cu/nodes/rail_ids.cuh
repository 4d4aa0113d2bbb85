// Ids as they cross between nodes.
#pragma once

#include "nodes/rail_params.cuh"

namespace cometrt {

// Ids of rail_choose. A pair that breaks a rule has kWrongPair minus its rank's token. If a node
// wants more tokens than may cross, the first pair of the rank has kTooMany plus how many it wants.
// As in cometrt/nodes/cuda.py.
constexpr int kNotHere = -1, kWrongPair = -2, kTooMany = -2147483647 - 1, kMostWanted = 1 << 30;

// This rank's id of a pair. One beyond int32 stays out of range; it must not wrap.
__device__ inline int id_of(const RailParams& params, long long pair) {
  if (params.id_bytes == 4) return static_cast<const int*>(params.ids)[pair];
  const long long id = static_cast<const long long*>(params.ids)[pair];
  return static_cast<int>(max(-2147483648ll, min(2147483647ll, id)));
}

}  // namespace cometrt
