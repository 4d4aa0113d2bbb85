"""The layer of benchmarks.rivals_jax with JAX's own grouped GEMMs, written in Pallas for Hopper.

Rows of an expert follow those of the one before. The last expert takes the padding rows, which are
zero: rows of no expert would stay as the memory was.
"""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
from jax import lax

import cometrt
from benchmarks.rivals_jax import Layer

# They divide the GEMMs of all models, and are not tuned.
BLOCKS = {"block_m": 128, "block_n": 128, "block_k": 64, "max_concurrent_steps": 4}
MOST_N_BLOCKS = 8  # of a raster group


class MosaicLayer(Layer):
    """The layer of one rank."""

    def __init__(self, spec: cometrt.MoESpec, ranks: int, tokens: int) -> None:
        super().__init__(spec, ranks, tokens)
        # Of all local experts: five deviations more than the mean fit.
        self.rows = -(-int(self.pairs + 5 * math.sqrt(self.pairs) + 64) // 256) * 256

    def fits(self, plan: dict[str, Any]) -> Any:
        table = plan["table"].reshape(self.ranks, self.ranks, self.local)
        return table.sum((0, 2)).max() <= self.rows

    def starts(self, counts: Any) -> Any:
        return jnp.cumsum(counts, 1, dtype=jnp.int32) - counts

    def gemm(self, form: str, a: Any, b: Any, plan: dict[str, Any]) -> Any:
        from jax.experimental.pallas.ops.gpu.ragged_dot_mgpu import ragged_dot
        from jax.experimental.pallas.ops.gpu.transposed_ragged_dot_mgpu import (
            transposed_ragged_dot,
        )

        mine = lax.axis_index("x") * self.local
        table = lax.dynamic_slice_in_dim(plan["table"], mine, self.local, 1)
        sizes = table.sum(0, dtype=jnp.int32)
        sizes = sizes.at[-1].add(self.rows - sizes.sum())
        to_experts = form == "ecm,ecn->emn"
        columns = b.shape[1] if to_experts or form == "eck,enk->ecn" else b.shape[2]
        group = math.gcd(columns // BLOCKS["block_n"], MOST_N_BLOCKS)
        options = {"group_sizes": sizes, "grid_block_n": group, **BLOCKS}
        if to_experts:
            return transposed_ragged_dot(a, b, **options)
        return ragged_dot(a, b, transpose_rhs=form == "eck,enk->ecn", **options)


LAYERS = {"jax batched": Layer, "jax mosaic": MosaicLayer}
