// The tile order of weight gradients: one expert after the other, that with the most rows first, so
// that the last steps are the shortest. All tiles of an expert take equally long.
#pragma once

#include "gemm/wgrad_problem.cuh"

namespace cometrt {

// The cluster steps of one expert and problem. Pairs of M-tiles share an N-tile; an M-tile that is
// left over takes two N-tiles in a step.
struct WgradSteps {
  const WgradProblem& problem;
  int kind, raster_group;

  __device__ int m_tiles() const { return (problem.num_rows + BLOCK_M - 1) / BLOCK_M; }
  __device__ int n_tiles() const { return (problem.num_columns + BLOCK_N - 1) / BLOCK_N; }
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

  // Both work tiles of a step. One without work still names the expert, whose K its CTA follows.
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

// Experts that come before this one: those with more rows, or as many and a lower number.
__device__ inline int place_of(const WgradParams& p, int expert) {
  const int rows = p.expert_rows[expert];
  int place = 0;
  for (int first = 0; first < p.num_experts; first += blockDim.x) {
    const int other = first + threadIdx.x;
    const int others = other < p.num_experts ? p.expert_rows[other] : -1;
    place += __syncthreads_count(others > rows || (others == rows && other < expert));
  }
  return place;
}

// By all threads of all blocks. An expert without rows has steps, which write zeros, unless
// gradients are accumulated. `first_step`: steps of other GEMMs that the list begins with;
// `first_kind`: of the first weight gradient.
__device__ inline void write_wgrad_order(const WgradParams& p, WorkTile* work_tiles, int* num_steps,
                                         int* progress, int first_step = 0, int first_kind = 0) {
  int steps_of_expert = 0;
  for (int kind = 0; kind < p.num_problems; ++kind) {
    steps_of_expert += WgradSteps{p.problems[kind], first_kind + kind, p.raster_group}.count();
  }
  for (int expert = blockIdx.x; expert < p.num_experts; expert += gridDim.x) {
    const int place = place_of(p, expert);
    if (p.accumulate && p.expert_rows[expert] == 0) continue;
    WorkTile* to = work_tiles + 2 * (first_step + static_cast<long long>(place) * steps_of_expert);
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
    const bool used = expert < p.num_experts && (!p.accumulate || p.expert_rows[expert] > 0);
    with_steps += __syncthreads_count(used);
  }
  if (threadIdx.x > 0) return;
  *num_steps = first_step + with_steps * steps_of_expert;
  progress[0] = progress[1] = 0;
}

}  // namespace cometrt
