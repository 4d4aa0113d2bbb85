// Waits that end: by the flag, by a deadline, or because another rank stopped the world.
#pragma once

#include "hopper/memory.cuh"

namespace cometrt {

// Mirrors failure_dtype of cometrt/world/failure.py without its text; lies in pinned host memory.
struct FailureRecord {
  long long kind, waiter, flag, peer, tile, chunk, epoch, expected, found;
  u32 taken;  // the first failure of a rank stands
  u32 valid;  // written last
};

enum FailureKind : int { kRaised = 1, kMismatch = 2, kTimeout = 3 };

// Numbers of FLAGS in cometrt/world/failure.py.
enum Flag : int { kSourceReady = 1, kTileFilled = 2, kTileDone = 3, kPartialsReady = 4 };

constexpr int kMaxRanks = 64;

// What every wait of a kernel needs to end in time and to tell why.
struct WaitContext {
  u64* abort[kMaxRanks];  // every rank's abort word
  FailureRecord* failure;
  u64 generation;
  u64 timeout_ns;
  u64 epoch;
  int rank, size;
};

struct Wanted {
  Flag flag;
  int peer, tile, chunk;
};

// Cold: writes the record, then raises abort on all ranks.
__device__ __noinline__ void report_timeout(const WaitContext& context, Wanted wanted, u64 expected,
                                            u64 found) {
  FailureRecord* record = context.failure;
  if (atomicExch_system(&record->taken, 1u) == 0) {
    record->kind = kTimeout;
    record->waiter = context.rank;
    record->flag = wanted.flag;
    record->peer = wanted.peer;
    record->tile = wanted.tile;
    record->chunk = wanted.chunk;
    record->epoch = context.epoch;
    record->expected = expected;
    record->found = found;
    fence_acq_rel_sys();
    atomicExch_system(&record->valid, 1u);
  }
  for (int peer = 0; peer < context.size; ++peer) {
    max_release_sys(context.abort[peer], context.generation);
  }
}

// True once load() >= expected, with acquire semantics if load has them; false if the wait ended
// without it: then the caller leaves the kernel. One thread waits, then a barrier for its peers.
template <typename Load>
__device__ inline bool wait_until(const WaitContext& context, Wanted wanted, u64 expected,
                                  Load load) {
  u64 found = load();
  if (found >= expected) return true;
  const u64 deadline = global_timer_ns() + context.timeout_ns;
  for (u32 polls = 1;; ++polls) {
    found = load();
    if (found >= expected) return true;
    if (polls % 64 == 0) {
      if (load_acquire_sys(context.abort[context.rank]) >= context.generation) return false;
      if (global_timer_ns() > deadline) {
        report_timeout(context, wanted, expected, found);
        return false;
      }
    }
  }
}

}  // namespace cometrt
