// Traces of the fused kernels: what their warps did and waited for, and when. cometrt/cuda/trace.py
// reads them. Macro TRACE: 1 compiles it in. Otherwise a Recorder is empty and leaves no machine
// code. A test deletes every line that names a recorder and compares, so each such line must stand
// alone.
#pragma once

#include "hopper/memory.cuh"

#ifndef TRACE
#define TRACE 0
#endif

namespace cometrt {

// Indices into KINDS of cometrt/cuda/trace.py. The last four are waits.
enum EventKind : u16 {
  kUp,
  kDown,
  kDownDgrad,
  kUpDgrad,
  kWgrad,
  kPull,
  kReduceAndPush,
  kReduceAtHome,
  kWaitTileFilled,
  kWaitTileDone,
  kWaitPartialsReady,
  kWaitLink,
};

// Trace lane warp + kTracedWarps * thread belongs to that thread of that warp of a CTA. Warp 0
// loads, 2 and 3 communicate (later 0 and 1 too), and warp 4 stands for all multiplying warps.
constexpr int kTracedWarps = 5, kTraceLanes = COMETRT_TRACE_LANES;
constexpr int kEventsOfLane = COMETRT_TRACE_EVENTS;
static_assert(kTraceLanes == 3 * kTracedWarps);

// Mirrored by trace_event_dtype in cometrt/kernels/params.py.
struct alignas(16) TraceEvent {
  u64 begin_ns, end_ns;
  u32 local_bytes, link_bytes;  // moved within the rank, and between ranks
  int tile;                     // M-tile, or token block; -1: none
  short column;                 // N-tile, or N-chunk; -1: none
  u16 kind;                     // EventKind
};

// Events of one trace lane of one CTA over all launches of a recording. num_events also counts
// events that found no room. Mirrored by trace_lane_dtype.
struct alignas(16) TraceLane {
  u32 num_events;
  int tile, column;  // of the current work tile
  u32 unused;
  u64 since_ns, waits_since_ns;  // begin of the current work and of the last wait
  TraceEvent events[kEventsOfLane];
};

#if TRACE

// One thread's trace. It must cost few registers, since accumulators and comm warps need them. So
// its state lies in global memory, and it recomputes its lane's address at each call.
class Recorder {
  static constexpr u64 kShortestWaitNs = 500;  // shorter waits count as work

 public:
  static constexpr bool kOn = true;
  EventKind kind = kUp;  // of the current work

  Recorder() = default;  // records nothing
  // The first `threads` threads of each traced warp record.
  __device__ Recorder(TraceLane* const* lanes, int threads, EventKind kind)
      : kind(kind), lanes_(lanes), threads_(threads) {}

  __device__ void begin() {
    if (TraceLane* lane = this->lane()) lane->since_ns = global_timer_ns();
  }
  // Adds bytes to the current work.
  __device__ void count(bool over_link, u32 bytes) {
    (over_link ? link_bytes_ : local_bytes_) += bytes;
  }
  __device__ void end(int tile, int column) {
    if (TraceLane* lane = this->lane()) {
      const u64 now_ns = global_timer_ns();
      write(*lane, kind, lane->since_ns, now_ns, tile, column);
      lane->since_ns = now_ns;
    }
    local_bytes_ = link_bytes_ = 0;
  }
  // The event of a work tile, kept in the lane: its main loop leaves no register for it.
  __device__ void begin_tile(int tile, int column) {
    if (TraceLane* lane = this->lane()) {
      lane->tile = tile, lane->column = column;
      lane->since_ns = global_timer_ns();
    }
  }
  // is_next_kind: the event is of the kind behind `kind`.
  __device__ void end_tile(bool is_next_kind) {
    if (TraceLane* lane = this->lane()) {
      write(*lane, static_cast<EventKind>(kind + is_next_kind), lane->since_ns, global_timer_ns(),
            lane->tile, lane->column);
    }
  }
  // For work in many small parts: ends an event once it has moved so many bytes, and begins the
  // next.
  __device__ void end_if_moved(u32 bytes) {
    if (local_bytes_ + link_bytes_ >= bytes) end(-1, -1);
  }

  __device__ void begin_wait() {
    if (TraceLane* lane = this->lane()) lane->waits_since_ns = global_timer_ns();
  }
  // Work in parts ends an event at the wait and begins the next behind it.
  __device__ void end_wait(EventKind wait, int tile, int column) {
    TraceLane* lane = this->lane();
    if (lane == nullptr) return;
    if (global_timer_ns() - lane->waits_since_ns < kShortestWaitNs) return;
    if (local_bytes_ + link_bytes_ > 0) {
      write(*lane, kind, lane->since_ns, lane->waits_since_ns, -1, -1);
    }
    local_bytes_ = link_bytes_ = 0;
    lane->since_ns = global_timer_ns();
    write(*lane, wait, lane->waits_since_ns, lane->since_ns, tile, column);
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
  __device__ void begin_tile(int, int) {}
  __device__ void end_tile(bool) {}
  __device__ void end_if_moved(u32) {}
  __device__ void begin_wait() {}
  __device__ void end_wait(EventKind, int, int) {}
};

#endif

}  // namespace cometrt
