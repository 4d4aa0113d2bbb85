// For measurements: holds a stream back until the host opens it or the deadline passes, so that all
// work queued behind it begins at once. Acquires `open`, in the host's memory.
#include "hopper/memory.cuh"

using namespace cometrt;

extern "C" __global__ void __launch_bounds__(1) start_barrier(const u64* open, u64 timeout_ns) {
  const u64 deadline = global_timer_ns() + timeout_ns;
  while (load_acquire_sys(open) == 0 && global_timer_ns() < deadline) __nanosleep(1000);
}
