// Gradients of the router weights: sums of a row's partials, and where a home keeps each shard's
// part. partials_ready protects the parts, like the partial rows that come with them.
#pragma once

#include "protocol/exchange_params.cuh"

namespace cometrt {

// The gradient that this rank computed for a row: the sum over N-tiles, in their order.
__device__ inline float dweight_of_row(const ExchangeParams& params, int row) {
  const float* partials = params.dweight_rows + row * params.num_dweight_partials;
  float sum = partials[0];
  for (u64 i = 1; i < params.num_dweight_partials; ++i) sum += partials[i];
  return sum;
}

// In the home's memory: what the TP shard computed for a pair, a number among the home's.
__device__ inline float* dweight_part(const ExchangeParams& params, int home, int shard,
                                      long long pair) {
  const long long pairs = static_cast<long long>(params.g.max_tokens) * params.g.topk;
  return params.data<float>(home, params.dweight_offset) + shard * pairs + pair;
}

// Of one of this rank's own pairs: the parts of all shards, in their order. `row`: of the pair on
// this rank, whose part need not lie in the heap; -1: none.
__device__ inline float sum_dweight_parts(const ExchangeParams& params, long long pair, int row) {
  float sum = 0;
  for (int shard = 0; shard < params.g.tp; ++shard) {
    const bool is_mine = row >= 0 && shard == params.world.rank % params.g.tp;
    const float part = is_mine ? dweight_of_row(params, row)
                               : *dweight_part(params, params.world.rank, shard, pair);
    sum = shard == 0 ? part : sum + part;
  }
  return sum;
}

}  // namespace cometrt
