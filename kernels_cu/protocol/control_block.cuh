// Memory that the ranks of a world share on the device: each rank's control block (flags, headers,
// failure records) and the addresses by which a rank reaches its peers'. Every kernel of an
// exchange gets them. Accesses to peers and signals between ranks go through protocol/peers.cuh.
// Mirrored in cometrt/kernels/params.py and cometrt/world/layout.py.
#pragma once

#include "hopper/memory.cuh"

namespace cometrt {

constexpr int kMaxRanks = COMETRT_MAX_RANKS;

// What a rank publishes of its call; all ranks compare the headers of an epoch.
struct Header {
  long long epoch, operation, layer, spec_hash, forward_epoch, num_tokens;
};

// Indices into KINDS and FLAGS of cometrt/world/failure.py.
enum FailureKind : int { kRaised = 1, kMismatch = 2, kTimeout = 3 };
enum Flag : int {
  kSourceReady = 1,
  kTileFilled = 2,
  kTileDone = 3,
  kPartialsReady = 4,
  kPlanStep = 8,
  kRailTokens = 9,
  kRailPartials = 10
};

// Who waited for what when a rank stopped the world.
struct FailureRecord {
  u64 generation;  // written last, by a release: the rest is valid once a reader acquires it
  long long kind, flag, waiter, peer, tile, chunk, epoch, expected, found;
};

// One a rank, in its memory. All ranks write to it. The host's own: cometrt/world/control_block.py.
struct ControlBlock {
  u64 source_ready[kMaxRanks];       // [s]: the last epoch that rank s published; rank s writes it
  Header header[2][kMaxRanks];       // [epoch parity, s]: rank s writes it before source_ready[s]
  FailureRecord failure[kMaxRanks];  // [r]: rank r writes it before abort[r]
  // [r]: the generation that rank r stops. Only rank r writes it, from its kernels or its host. So
  // plain stores suffice, also over links without atomics. It only grows.
  u64 abort[kMaxRanks];
  // [r]: the last part of other nodes' tokens that has arrived at rank r, as part_flag() counts
  // them; rank r writes it.
  u64 rail_ready[kMaxRanks];
  // The owner alone writes these.
  u64 generation;  // of the world, counted by reset: kernels of another generation do nothing
  u64 reported;    // the last generation that kernels of this rank stopped
  u64 epoch;       // of the exchange under way, or the last one
  u64 held;        // epoch of a failed call whose error the host has not raised yet, or 0
  u64 rail_calls;  // calls with late parts that this rank has begun; reset makes ranks agree on it
};

// This rank's addresses of all ranks' memory. Only protocol/peers.cuh reads the arrays for a peer.
struct World {
  ControlBlock* control[kMaxRanks];
  char* data[kMaxRanks];        // region of rows: x, dy, staging rows, dweight
  char* flags[kMaxRanks];       // region of flags: partials_ready
  char* routing[2][kMaxRanks];  // regions of ids and router weights, by epoch parity
  u64 generation, timeout_ns;   // as of the launch
  int rank, size;

  __device__ const ControlBlock& own() const { return *control[rank]; }
  __device__ u64 epoch() const { return own().epoch; }
};

}  // namespace cometrt
