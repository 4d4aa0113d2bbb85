// Holds a stream back until the host opens it or the deadline passes, so that what is queued behind
// it begins when all of it is there. Acquires `open`, in the host's memory.
#include "hopper/memory.cuh"

using namespace cometrt;

extern "C" __global__ void gate(const u64* open, u64 timeout_ns) {
  const u64 deadline = global_timer_ns() + timeout_ns;
  while (load_acquire_sys(open) == 0 && global_timer_ns() < deadline) __nanosleep(1000);
}
