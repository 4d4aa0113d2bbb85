// Work that blocks of a launch take one item after the other, as they come and get done.
#pragma once

#include "hopper/memory.cuh"

namespace cometrt {

// A block's end of a queue of items [0, count). Its next item is asked for ahead: the answer comes
// while the block works, or waits, for something else.
class WorkQueue {
 public:
  // taken: of all blocks; 0 before the first.
  __device__ WorkQueue(u32* taken, int count) : taken_(taken), count_(count) { request(); }

  // By all threads, when they have done with the last item: the next one, or -1 if none is left.
  // `shared` is the block's, and valid until the next use.
  __device__ int take(int* shared) {
    __syncthreads();
    if (threadIdx.x == 0) {
      *shared = next_ < count_ ? next_ : -1;
      if (next_ < count_) request();
    }
    __syncthreads();
    return *shared;
  }

 private:
  __device__ void request() {
    if (threadIdx.x == 0) next_ = static_cast<int>(fetch_add_relaxed_gpu(taken_, 1));
  }

  u32* taken_;
  int count_;
  int next_ = 0;  // the first thread's
};

}  // namespace cometrt
