// Start barrier for measurements (the tuner, benchmarks): holds a stream until the host sets
// `open`, so that calls queued behind it start together. Acquires `open`, in host memory, at system
// scope. After the deadline it continues without it.
#include "protocol/peers.cuh"

using namespace cometrt;

extern "C" __global__ void __launch_bounds__(1) start_barrier(const u64* open, u64 timeout_ns) {
  const u64 deadline = global_timer_ns() + timeout_ns;
  while (acquire(open) == 0 && global_timer_ns() < deadline) __nanosleep(1000);
}
