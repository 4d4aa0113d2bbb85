// What the ranks of a world share on the device. Mirrored in cometrt/kernels/params.py.
#pragma once

#include "hopper/memory.cuh"

namespace cometrt {

constexpr int kMaxRanks = COMETRT_MAX_RANKS;

struct Header {
  long long epoch, operation, layer, spec_hash, forward_epoch, num_tokens;
};

// Numbers of KINDS and FLAGS in cometrt/world/failure.py.
enum FailureKind : int { kRaised = 1, kMismatch = 2, kTimeout = 3 };
enum Flag : int {
  kSourceReady = 1,
  kTileFilled = 2,
  kTileDone = 3,
  kPartialsReady = 4,
  kPlanStep = 8
};

struct FailureRecord {
  u64 generation;  // written last: then the rest is valid
  long long kind, flag, waiter, peer, tile, chunk, epoch, expected, found;
};

// One a rank, in its memory; all ranks write to it. On the host: cometrt/world/board.py.
struct ControlBlock {
  u64 source_ready[kMaxRanks];       // [s]: rank s
  Header header[2][kMaxRanks];       // [epoch parity, s]: rank s
  FailureRecord failure[kMaxRanks];  // [r]: rank r
  // [r]: the generation that rank r stops. Only that rank writes it, its kernels and its host
  // alike, so that plain stores do; it only grows (kernels_cu/README.md).
  u64 abort[kMaxRanks];
  // The owner writes these.
  u64 generation;  // of the world: kernels of another generation do nothing
  u64 reported;    // the last generation of which its kernels have reported a failure
  u64 epoch;
  u64 held;  // the epoch of a failed call whose error the host has not raised yet, or 0
};

// The ranks as one of them reaches them.
struct World {
  ControlBlock* control[kMaxRanks];
  char* data[kMaxRanks];  // regions of the symmetric heap
  char* flags[kMaxRanks];
  char* routing[2][kMaxRanks];  // by epoch parity
  u64 generation, timeout_ns;
  int rank, size;

  __device__ const ControlBlock& own() const { return *control[rank]; }
  __device__ u64 epoch() const { return own().epoch; }
  // Whether a rank has stopped the world, or it has been reset since the launch. Acquires the
  // failure record.
  __device__ bool stopped() const {
    bool any = load_relaxed_sys(&own().generation) != generation;
    for (int r = 0; r < size; ++r) any |= load_relaxed_sys(&own().abort[r]) >= generation;
    if (any) fence_acq_rel_sys();
    return any;
  }
};

}  // namespace cometrt
