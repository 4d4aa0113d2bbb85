// What the ranks of a world share on the device. Mirrored in cometrt/kernels/params.py.
#pragma once

#include "hopper/memory.cuh"

namespace cometrt {

constexpr int kMaxRanks = 64;

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

// One a rank, written by all: as the board of cometrt/world/board.py.
struct Control {
  u64 source_ready[kMaxRanks];       // [s]: rank s
  Header header[2][kMaxRanks];       // [epoch parity, s]: rank s
  FailureRecord failure[kMaxRanks];  // [r]: rank r
  // [r]: rank r, its kernels and its host alike: the generation that it stops. Each word has one
  // writer, so that plain stores do, and only grows: see kernels_cu/README.md.
  u64 abort[kMaxRanks];
  // The owner's.
  u64 generation;  // of the world: kernels that were launched in another one do nothing
  u64 reported;    // last generation that its kernels have reported a failure of
  u64 epoch;
  u64 held;  // epoch of a failed call whose error the host has not raised yet, or 0
};

// This rank's view of all.
struct World {
  Control* control[kMaxRanks];
  char* data[kMaxRanks];  // segments of the symmetric heap
  char* flags[kMaxRanks];
  char* routing[2][kMaxRanks];  // by epoch parity
  u64 generation, timeout_ns;
  int rank, size;

  __device__ const Control& own() const { return *control[rank]; }
  __device__ u64 epoch() const { return own().epoch; }
  // By any rank, or reset since the kernel was launched. Acquires the failure record.
  __device__ bool stopped() const {
    bool any = load_relaxed_sys(&own().generation) != generation;
    for (int r = 0; r < size; ++r) any |= load_relaxed_sys(&own().abort[r]) >= generation;
    if (any) fence_acq_rel_sys();
    return any;
  }
};

}  // namespace cometrt
