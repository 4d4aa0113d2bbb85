// Whether all CTAs of a launch in clusters of four, each as large as an SM, run at once: on some
// partitions of a GPU there is no room for the last cluster.
#include "hopper/memory.cuh"

using namespace cometrt;

constexpr u64 kPatienceNs = 2000000;

// counts [2]: CTAs that have begun; those that did not see all others. Both zero before.
extern "C" __global__ void __cluster_dims__(4, 1, 1) residency(u32* counts) {
  add_release_gpu(&counts[0], 1);
  const u64 deadline = global_timer_ns() + kPatienceNs;
  while (load_acquire_gpu(&counts[0]) < gridDim.x) {
    if (global_timer_ns() > deadline) {
      add_release_gpu(&counts[1], 1);
      return;
    }
  }
}
