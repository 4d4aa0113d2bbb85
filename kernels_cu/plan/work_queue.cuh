// A queue of work items that the blocks of a launch pop as they come free.
#pragma once

#include "hopper/memory.cuh"

namespace cometrt {

// A block's end of a queue of items [0, count). It requests its next ticket ahead: the answer
// arrives while the block works on something else, or waits for it.
class WorkQueue {
 public:
  // queue_head: shared by all blocks; 0 before the first pop.
  __device__ WorkQueue(u32* queue_head, int count) : queue_head_(queue_head), count_(count) {
    request();
  }

  // By all threads, when they have finished the last item: the next one, or -1 if none is left.
  // `shared`: a word of the block's shared memory, overwritten by the next pop.
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
  int ticket_ = 0;  // the first thread's
};

}  // namespace cometrt
