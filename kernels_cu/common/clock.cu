// Reads the GPU's clock, whose zero differs from GPU to GPU. The host compares it with its own, so
// that one timeline holds the events of all ranks.
#include "hopper/memory.cuh"

using namespace cometrt;

// time_ns: in the host's memory.
extern "C" __global__ void __launch_bounds__(1) read_clock(u64* time_ns) {
  *time_ns = global_timer_ns();
}
