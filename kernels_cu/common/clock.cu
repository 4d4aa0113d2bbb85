// Reads the GPU's clock, whose zero differs from GPU to GPU. The host compares it with its own, so
// that one timeline holds the events of all ranks. cometrt/cuda/launch_trace.py launches both
// kernels around launches that do not record themselves.
#include "hopper/memory.cuh"

using namespace cometrt;

// time_ns: in the host's memory, or the first word of a launch's record.
extern "C" __global__ void __launch_bounds__(1) read_clock(u64* time_ns) {
  *time_ns = global_timer_ns();
}

// Behind a launch. record: when it began, when it ended, and how many tokens it moved between
// ranks. num_tokens: null if it moves none. ok: ExchangeState.ok; without it the plan is not valid.
extern "C" __global__ void __launch_bounds__(1)
    end_launch(u64* record, const u32* ok, const int* num_tokens) {
  record[1] = global_timer_ns();
  record[2] = num_tokens != nullptr && *ok != 0 ? *num_tokens : 0;
}
