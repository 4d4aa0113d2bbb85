// What the CTAs of the fused kernels did, when, and what they waited for. Only where TRACE is 1:
// else a Recorder is empty, and the machine code is that of sources without one. So that a test can
// make those, every line of a kernel that names a recorder can be left out.
#pragma once

#include "hopper/memory.cuh"

#ifndef TRACE
#define TRACE 0
#endif

namespace cometrt {

// Numbers of KINDS in cometrt/cuda/trace.py. The last four are waits.
enum EventKind : u16 {
  kUp,
  kDown,
  kPull,
  kReduceAndPush,
  kReduceAtHome,
  kWaitTileFilled,
  kWaitTileDone,
  kWaitPartialsReady,
  kWaitLink,
};

// A CTA's lanes: first threads of its first five warps, then their second ones, and so on. Warp 0
// loads, 2 and 3 move rows, and in the end 0 and 1 too, 4 is_elected for all that multiply.
constexpr int kTracedWarps = 5, kTraceLanes = COMETRT_TRACE_LANES;
constexpr int kEventsOfLane = COMETRT_TRACE_EVENTS;
static_assert(kTraceLanes == 3 * kTracedWarps);

// Mirrored, as is TraceLane, in cometrt/kernels/params.py.
struct alignas(16) TraceEvent {
  u64 begin_ns, end_ns;
  u32 local_bytes, link_bytes;  // moved within the rank and between ranks
  int tile;                     // M-tile, or block of tokens; -1: none
  short column;                 // N-tile, or chunk; -1: none
  u16 kind;
};

// Events of one lane of one CTA, launch after launch. Those that find no room are counted too.
struct alignas(16) TraceLane {
  u32 num_events, unused[3];
  u64 since_ns, waits_since_ns;  // when the work that goes on began, and the last wait
  TraceEvent events[kEventsOfLane];
};

#if TRACE

// One thread's. It must not cost registers that movers and accumulators need: what it remembers
// lies in memory, in its lane, and which lane that is it works out anew each time.
class Recorder {
  static constexpr u64 kShortestWaitNs = 500;  // shorter ones belong to the work around them

 public:
  static constexpr bool kOn = true;
  EventKind kind = kUp;  // of the work

  Recorder() = default;  // records nothing
  // The first `threads` threads of a warp record; of those that multiply, the first warp.
  __device__ Recorder(TraceLane* const* lanes, int threads, EventKind kind)
      : kind(kind), lanes_(lanes), threads_(threads) {}

  __device__ void begin() {
    if (TraceLane* lane = this->lane()) lane->since_ns = global_timer_ns();
  }
  // Of the work since it began.
  __device__ void count(bool crosses, u32 bytes) {
    (crosses ? link_bytes_ : local_bytes_) += bytes;
  }
  __device__ void end(int tile, int column) {
    if (TraceLane* lane = this->lane()) {
      const u64 now_ns = global_timer_ns();
      write(*lane, kind, lane->since_ns, now_ns, tile, column);
      lane->since_ns = now_ns;
    }
    local_bytes_ = link_bytes_ = 0;
  }
  // Of work in many small parts: tells what so many bytes took, and begins anew.
  __device__ void end_part(u32 bytes) {
    if (local_bytes_ + link_bytes_ >= bytes) end(-1, -1);
  }

  __device__ void begin_wait() {
    if (TraceLane* lane = this->lane()) lane->waits_since_ns = global_timer_ns();
  }
  // Work in parts is reported as far as the wait, and begins anew behind it.
  __device__ void end_wait(EventKind wait, int tile, int column) {
    TraceLane* lane = this->lane();
    if (lane == nullptr) return;
    const u64 now_ns = global_timer_ns(), waits_since_ns = lane->waits_since_ns;
    if (now_ns - waits_since_ns < kShortestWaitNs) return;
    if (local_bytes_ + link_bytes_ > 0) write(*lane, kind, lane->since_ns, waits_since_ns, -1, -1);
    local_bytes_ = link_bytes_ = 0;
    write(*lane, wait, waits_since_ns, now_ns, tile, column);
    lane->since_ns = now_ns;
  }

 private:
  __device__ TraceLane* lane() const {
    const int thread_of_cta = thread_index(), warp = thread_of_cta / 32;
    const int thread = thread_of_cta % 32;
    if (thread >= threads_ || lanes_ == nullptr || warp >= kTracedWarps || *lanes_ == nullptr)
      return nullptr;
    return &(*lanes_)[blockIdx.x * kTraceLanes + thread * kTracedWarps + warp];
  }
  __device__ void write(TraceLane& lane, EventKind kind, u64 begin_ns, u64 end_ns, int tile,
                        int column) const {
    const u32 index = lane.num_events++;
    if (index >= kEventsOfLane) return;
    lane.events[index] = {
        begin_ns, end_ns, local_bytes_, link_bytes_, tile, static_cast<short>(column), kind};
  }

  TraceLane* const* lanes_ = nullptr;
  int threads_ = 0;
  u32 local_bytes_ = 0, link_bytes_ = 0;
};

#else

struct Recorder {
  static constexpr bool kOn = false;
  struct Ignored {
    __device__ void operator=(EventKind) {}
  } kind;

  Recorder() = default;
  __device__ Recorder(TraceLane* const*, int, EventKind) {}
  __device__ void begin() {}
  __device__ void count(bool, u32) {}
  __device__ void end(int, int) {}
  __device__ void end_part(u32) {}
  __device__ void begin_wait() {}
  __device__ void end_wait(EventKind, int, int) {}
};

#endif

}  // namespace cometrt
