// The up dgrad and the weight gradients as GEMMs of one launch. A work tile's kind selects the
// GEMM: 0 is the up dgrad, dx = dz w_up[expert]; kFirstWgrad and above are weight gradients.
#pragma once

#include "gemm/grad_operands.cuh"

namespace cometrt {

// The same tile with kinds that count weight gradients alone, from 0 on.
__device__ inline WorkTile wgrad_tile(WorkTile tile) {
  tile.packed -= kFirstWgrad << 4;
  return tile;
}

// The list has the cluster steps of the up dgrad, then those of the weight gradients. Mirrored by
// up_dgrad_wgrad_params_dtype in cometrt/kernels/params.py.
struct UpDgradWgradParams : WgradParams {
  WgradProblem dx;  // one matrix of all rows
  int num_dx_k_blocks, padding;

  __device__ static bool is_wgrad(const WorkTile& tile) { return tile.kind() >= kFirstWgrad; }
  __device__ const WgradProblem& problem_of(const WorkTile& tile) const {
    return is_wgrad(tile) ? problems[tile.kind() - kFirstWgrad] : dx;
  }
  __device__ int num_k_blocks(const WorkTile& tile) const {
    return is_wgrad(tile) ? WgradParams::num_k_blocks(tile) : num_dx_k_blocks;
  }
  // Of the up dgrad: as of one set at row 0.
  __device__ RowSetBlocks k_blocks(const WorkTile& tile) const {
    RowSetBlocks blocks = WgradParams::k_blocks(tile);
    if (!is_wgrad(tile)) blocks.end = num_dx_k_blocks;
    return blocks;
  }
};

// Selects the operand policy by the work tile's kind.
struct UpDgradWgradOperands {
  using OfFirstKind = RowsTimesTransposedWeights;
  using OfOtherKinds = TransposedRowsTimesRows;
  static constexpr bool kByKind = true;

  OfFirstKind dgrad;
  OfOtherKinds wgrad;

  __device__ static u32 a_bytes(const WorkTile& tile) { return RowsOperand::a_bytes(tile); }
  __device__ void load(Stage& stage, u64* full, const WorkTile& tile, int k) const {
    if (tile.kind() < kFirstWgrad) {
      dgrad.load(stage, full, tile, k);
    } else {
      wgrad.load(stage, full, wgrad_tile(tile), k);
    }
  }
};

}  // namespace cometrt
