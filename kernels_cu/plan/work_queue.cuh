// How blocks of the planner share the items of a step: they pop items as they come free. A queue's
// head is a relaxed atomic in PlanProgress, which protects no data.
#pragma once

#include "hopper/memory.cuh"

namespace cometrt {

// One block's view of a queue of items [0, count). It requests the next ticket ahead, so that the
// atomic's latency overlaps with the current item.
class WorkQueue {
 public:
  // queue_head: in global memory, shared by all blocks, 0 before the first pop.
  __device__ WorkQueue(u32* queue_head, int count) : queue_head_(queue_head), count_(count) {
    request();
  }

  // By all threads of the block: the next item, or -1 if none is left. `shared`: a word of shared
  // memory, valid until the next pop.
  __device__ int pop(int* shared) {
    __syncthreads();
    if (threadIdx.x == 0) {
      *shared = ticket_ < count_ ? ticket_ : -1;
      if (ticket_ < count_) request();
    }
    __syncthreads();
    return *shared;
  }

 private:
  __device__ void request() {
    if (threadIdx.x == 0) ticket_ = static_cast<int>(fetch_add_relaxed_gpu(queue_head_, 1));
  }

  u32* queue_head_;
  int count_;
  int ticket_ = 0;  // in thread 0
};

}  // namespace cometrt
