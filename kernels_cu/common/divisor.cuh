// Division by a number that many values share. Used by the planner and the tile order.
#pragma once

#include "hopper/memory.cuh"

namespace cometrt {

// Divides numbers that are not negative by the same positive one, in four instructions. The high
// word of value * floor((2^32 - 1) / divisor) is the quotient, or one less.
class Divisor {
 public:
  __device__ explicit Divisor(int divisor)
      : divisor_(divisor), reciprocal_(0xffffffffu / static_cast<u32>(divisor)) {}

  __device__ int quotient(int value) const {
    const u32 low = __umulhi(value, reciprocal_);
    return low + (value - low * divisor_ >= divisor_);
  }
  __device__ int divisor() const { return divisor_; }
  __device__ int remainder(int value) const { return value - quotient(value) * divisor_; }

 private:
  u32 divisor_, reciprocal_;
};

}  // namespace cometrt
