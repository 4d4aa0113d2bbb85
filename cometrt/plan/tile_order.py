"""The order of a GEMM's tiles as data: what each cluster of two CTAs computes, step by step.

Both CTAs of a cluster step read one operand in common. Each loads one half of it and multicasts
that to both. The common operand is B for two M-tiles of one expert against the same columns of its
weights, or A for one M-tile against two neighbouring N-tiles.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np

from cometrt.kernels.constants import BLOCK_M, BLOCK_N, CLUSTER_SIZE
from cometrt.plan.tables import Plan

_L2_BYTES_FOR_WEIGHTS = 20 << 20  # of a whole GPU; weights within it are read from memory once

work_tile_dtype = np.dtype(
    [
        ("m_tile", np.int32),  # -1: nothing to do
        ("n_tile", np.int32),
        ("expert", np.int32),
        ("rows", np.uint16),  # of the M-tile, without padding
        ("packed", np.uint16),  # halves of A in bits 0 and 1, of B in 2 and 3; problem from bit 4
    ]
)


def num_n_tiles(columns: int, *, gated: bool, block_n: int = BLOCK_N) -> int:
    """N-tiles of `block_n` columns of a result of that many columns. A gated tile has half of its
    columns from gate and half from up."""
    return -(-columns // (block_n // 2 if gated else block_n))


def max_cluster_steps(max_tiles: int, n_tiles: int, n_chunk: int | None = None) -> int:
    """Cluster steps of the worst order: every M-tile alone, in every walk over an N-chunk."""
    chunks = _slices(range(n_tiles), n_chunk)
    return max_tiles * sum(-(-len(chunk) // CLUSTER_SIZE) for chunk in chunks)


def pipeline_chunk_begin(num_tiles: int, index: int, count: int) -> int:
    """Order index of the first tile of the index-th of `count` even pipeline chunks."""
    return num_tiles * index // count


def best_raster_group(num_sms: int, gpu_sms: int, inner: int) -> int:
    """N-tiles of a raster group; even.

    The tiles in flight should cover about as many rows as columns: then they read the fewest
    operands. Up to twice as many columns pay if the group's weights stay in these SMs' share of the
    L2 cache meanwhile.

    Args:
        num_sms, gpu_sms: that compute; of the GPU.
        inner: K.
    """
    square = max(1, math.isqrt(num_sms // 2))
    cached = _L2_BYTES_FOR_WEIGHTS * num_sms // gpu_sms // (2 * BLOCK_N * inner)
    return max(2, max(square, min(cached, 2 * square)) // 2 * 2)


def make_tile_order(
    plan: Plan,
    n_tiles: int,
    *,
    backwards: bool = False,
    n_chunk: int | None = None,
    raster_group: int | None = None,
    pipeline_chunk: tuple[int, int] = (0, 1),
    num_weights: int | None = None,
) -> np.ndarray:
    """The specification of kernels_cu/scheduler/tile_order.cu.

    The dispatch order is cut into tile runs where the plan expert changes. M-tiles of a run that
    have more than 64 rows form pairs. All pairs take the first raster group, one N-tile a step.
    Then the left-over M-tiles take it, two N-tiles a step. Then comes the next group: so its
    weights serve all tiles while they are in the cache.

    Args:
        plan: made with block_m = 128.
        n_tiles: of `num_n_tiles`.
        backwards: walk the dispatch order from its end.
        n_chunk: walk all of it once for each so many N-tiles; None: once for all.
        raster_group: N-tiles of a group, within an N-chunk; even; None: all of them.
        pipeline_chunk: (index, count): only tiles of this pipeline chunk, of so many.
        num_weights: experts that have weights; plan expert p has those of p % num_weights. None:
            all have their own.

    Returns:
        [cluster steps, 2] of work_tile_dtype.
    """
    order = plan.dispatch_order()
    index, count = pipeline_chunk
    begin, end = (pipeline_chunk_begin(len(order), index + i, count) for i in (0, 1))
    order = order[begin:end][::-1] if backwards else order[begin:end]
    tiles: list[tuple[int, ...]] = []
    for columns in _slices(range(n_tiles), n_chunk):
        for expert, run in itertools.groupby(order, key=lambda tile: int(plan.tile_expert[tile])):
            for m_tiles, some in _steps(plan, expert, list(run), columns, raster_group):
                tiles += _cluster_step(plan, expert, m_tiles, some)
    made = np.array(tiles, work_tile_dtype).reshape(-1, CLUSTER_SIZE)
    made["expert"] %= num_weights or len(plan.expert_rows)
    return made


def _slices(columns: range, size: int | None) -> list[range]:
    step = size or max(1, len(columns))
    return [columns[first : first + step] for first in range(0, len(columns), step)]


def _rows(plan: Plan, expert: int, tile: int) -> int:
    end = int(plan.expert_offsets[expert] + plan.expert_rows[expert])
    return min(BLOCK_M, end - tile * BLOCK_M)


def _steps(
    plan: Plan, expert: int, run: list[int], columns: range, raster_group: int | None
) -> Iterator[tuple[list[int], range]]:
    """M-tiles and N-tiles of each cluster step of a tile run."""
    large = [tile for tile in run if _rows(plan, expert, tile) > BLOCK_M // 2]
    pairs = [large[i : i + 2] for i in range(0, len(large) - 1, 2)]
    paired = [tile for pair in pairs for tile in pair]
    for group in _slices(columns, raster_group):
        for pair in pairs:
            for column in _slices(group, 1):
                yield pair, column
        for tile in run:
            if tile not in paired:
                for both in _slices(group, 2):
                    yield [tile], both


def _cluster_step(
    plan: Plan, expert: int, m_tiles: list[int], columns: range
) -> list[tuple[int, ...]]:
    """Both CTAs' work tiles. A CTA that is left over has nothing to do."""
    tiles: list[tuple[int, ...]] = []
    for m, tile in enumerate(m_tiles):
        rows = _rows(plan, expert, tile)
        for n, column in enumerate(columns):
            a = _half(n, len(columns), first_only=rows <= BLOCK_M // 2)
            tiles.append((tile, column, expert, rows, a | _half(m, len(m_tiles)) << 2))
    return tiles + [(-1, 0, 0, 0, 0)] * (CLUSTER_SIZE - len(tiles))


def _half(index: int, readers: int, *, first_only: bool = False) -> int:
    """What a CTA loads of an operand. 3: both halves, for itself. 1, 2: the first or the second
    half, for both CTAs. 0: nothing.

    Args:
        index: among the CTAs that read it.
        first_only: there is no second half.
    """
    if readers == 1:
        return 3
    return (1, 0 if first_only else 2)[index]
