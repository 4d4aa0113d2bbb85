// Late parts: over several nodes, tokens of other nodes that arrive at their homes while the call
// is under way. A home's rows are those of each part, and then its own tokens. Row set 0 of the
// plan are the own tokens, set 1 + i those of part i. Sets are multiplied in that order, and
// combined in the reverse order.
#pragma once

#include "protocol/wait.cuh"

namespace cometrt {

constexpr int kMaxLateParts = 4;  // MAX_RAIL_PARTS of cometrt/plan/config.py

// Waits for parts, in multiples of the world's timeout: longer than the transfers of tables and
// parts, one after the other, whose reports say more. Waits for ranks that wait for parts last
// longer still.
constexpr u32 kLatePatience = COMETRT_LATE_PATIENCE;
static_assert(kLatePatience > kMaxLateParts + 1);

// The value of rail_ready when so many parts of this rank's call have arrived.
__device__ inline u64 part_flag(const World& world, int parts) {
  static_assert(kMaxLateParts < 16);
  return 16 * world.own().rail_calls + parts;
}

// By a warp: waits until so many parts have arrived at every rank of the node, a lane a rank. False
// if the world has stopped. Bulk loads of the parts' rows may follow.
__device__ inline bool wait_parts(const World& world, int parts) {
  const u64 expected = part_flag(world, parts);
  bool ok = true;
  for (int peer = threadIdx.x % 32; peer < world.size; peer += 32) {
    const u64* ready = &world.own().rail_ready[peer];
    ok &= wait_until(
        world, {kRailTokens, peer, parts - 1, -1}, world.epoch(), expected,
        [&] { return poll(ready); }, kLatePatience);
  }
  fence_system();  // acquires what has been polled
  ok = __all_sync(~0u, ok);
  fence_proxy_async();
  __syncwarp();  // orders every lane's acquire before all lanes' loads
  return ok;
}

// By a warp: signals that so many parts have arrived here on every rank of the node. An earlier
// launch on the stream has brought them. The partner is wait_parts(). A launch of an older
// generation signals nothing.
__device__ inline void signal_parts(const World& world, int parts) {
  if (poll(&world.own().generation) != world.generation) return;
  fence_system();
  for (int peer = threadIdx.x % 32; peer < world.size; peer += 32) {
    signal(&control_of(world, peer).rail_ready[world.rank], part_flag(world, parts));
  }
}

}  // namespace cometrt
