// The tile order of weight gradients: expert by expert, the one with the most rows in all row sets
// first. All tiles of an expert take equally long, since its rows are K. So the last steps are the
// shortest.
#pragma once

#include "gemm/wgrad_problem.cuh"

namespace cometrt {

// The cluster steps of one expert and problem. A step has two M-tiles of one N-tile. Where the
// number of M-tiles is odd, the last one takes two N-tiles in a step.
struct WgradSteps {
  const WgradProblem& problem;
  int kind, raster_group;

  __device__ int m_tiles() const { return (problem.num_rows + BLOCK_M - 1) / BLOCK_M; }
  __device__ int n_tiles() const { return (problem.num_columns + BLOCK_N - 1) / BLOCK_N; }
  // Steps of a raster group of so many N-tiles.
  __device__ int of_group(int width) const {
    return m_tiles() / 2 * width + m_tiles() % 2 * ((width + 1) / 2);
  }
  __device__ int count() const {
    const int groups = n_tiles() / raster_group;
    return groups * of_group(raster_group) + of_group(n_tiles() % raster_group);
  }

  __device__ WorkTile tile(int expert, int m_tile, int n_tile, u32 a, u32 b) const {
    const int rows = min(BLOCK_M, problem.num_rows - m_tile * BLOCK_M);
    return {m_tile, n_tile, expert, static_cast<u16>(rows),
            static_cast<u16>(a | b << 2 | kind << 4)};
  }

  // Writes both work tiles of a step. An idle one names the expert too, since its CTA goes through
  // the same K blocks as its neighbour.
  __device__ void write(int step, int expert, WorkTile* to) const {
    const int group = step / of_group(raster_group), first = group * raster_group;
    const int width = min(raster_group, n_tiles() - first), pairs = m_tiles() / 2;
    int in_group = step - group * of_group(raster_group);
    if (in_group < pairs * width) {
      const int m_tile = in_group / width * 2, n_tile = first + in_group % width;
      to[0] = tile(expert, m_tile, n_tile, kBothHalves, kFirstHalf);
      to[1] = tile(expert, m_tile + 1, n_tile, kBothHalves, kSecondHalf);
      return;
    }
    in_group -= pairs * width;
    const int m_tile = 2 * pairs, n_tile = first + 2 * in_group;
    const bool both = 2 * in_group + 1 < width;
    to[0] = tile(expert, m_tile, n_tile, both ? kFirstHalf : kBothHalves, kBothHalves);
    to[1] =
        tile(expert, m_tile, n_tile + 1, to[0].rows > kHalfM ? kSecondHalf : kNoHalf, kBothHalves);
    if (!both) to[1] = {-1, 0, expert, 0, static_cast<u16>(kind << 4)};
  }
};

// An expert's index in the order of falling rows, by number where rows are equal. By all threads of
// a block.
__device__ inline int index_by_rows(const WgradParams& p, int expert) {
  const int rows = p.rows_of(expert);
  int index = 0;
  for (int first = 0; first < p.num_experts; first += blockDim.x) {
    const int other = first + threadIdx.x;
    const int others = other < p.num_experts ? p.rows_of(other) : -1;
    index += __syncthreads_count(others > rows || (others == rows && other < expert));
  }
  return index;
}

// By all threads of all blocks. The steps of an expert without rows write zeros; they are left out
// where gradients are accumulated. `first_step`: number of steps of other GEMMs at the list's
// begin. `first_kind`: kind of the first weight gradient.
__device__ inline void write_wgrad_order(const WgradParams& p, WorkTile* work_tiles, int* num_steps,
                                         int* progress, int first_step = 0, int first_kind = 0) {
  int steps_of_expert = 0;
  for (int kind = 0; kind < p.num_problems; ++kind) {
    steps_of_expert += WgradSteps{p.problems[kind], first_kind + kind, p.raster_group}.count();
  }
  for (int expert = blockIdx.x; expert < p.num_experts; expert += gridDim.x) {
    const int index = index_by_rows(p, expert);
    if (p.accumulate && p.rows_of(expert) == 0) continue;
    WorkTile* to = work_tiles + 2 * (first_step + static_cast<long long>(index) * steps_of_expert);
    for (int kind = 0; kind < p.num_problems; ++kind) {
      const WgradSteps steps{p.problems[kind], first_kind + kind, p.raster_group};
      for (int step = threadIdx.x; step < steps.count(); step += blockDim.x) {
        steps.write(step, expert, to + 2ll * step);
      }
      to += 2ll * steps.count();
    }
  }
  if (blockIdx.x > 0) return;
  int with_steps = 0;
  for (int first = 0; first < p.num_experts; first += blockDim.x) {
    const int expert = first + threadIdx.x;
    const bool used = expert < p.num_experts && (!p.accumulate || p.rows_of(expert) > 0);
    with_steps += __syncthreads_count(used);
  }
  if (threadIdx.x > 0) return;
  *num_steps = first_step + with_steps * steps_of_expert;
  progress[0] = progress[1] = 0;
}

}  // namespace cometrt
