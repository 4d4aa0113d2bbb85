"""The order of a GEMM's tiles as data: what each cluster of two CTAs computes, turn by turn.

Both CTAs of a turn read one operand in common, which each then loads half of for both: two
M-tiles of one expert against the same columns of its weights, or one M-tile against two
neighbouring column tiles.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np

from cometrt.kernels.constants import BLOCK_M, BLOCK_N
from cometrt.plan.tables import Plan

_KEPT_BYTES = 20 << 20  # of the cache, for weights that are read again

work_tile_dtype = np.dtype(
    [
        ("m_tile", np.int32),  # M-tile; -1: nothing to do
        ("n_tile", np.int32),  # N-tile
        ("expert", np.int32),
        ("rows", np.uint16),  # of the M-tile, without padding
        (
            "packed",
            np.uint16,
        ),  # multicast halves of A in bits 0 and 1, of B in 2 and 3; its problem from 4
    ]
)


def num_n_tiles(columns: int, *, gated: bool) -> int:
    """N-tiles of a result of that many columns; a gated tile has half, from gate and from up."""
    return -(-columns // (BLOCK_N // 2 if gated else BLOCK_N))


def max_cluster_steps(max_tiles: int, num_columns: int, n_chunk: int | None = None) -> int:
    """Cluster steps of the worst order: every M-tile alone, in every walk over a chunk."""
    return max_tiles * sum(-(-len(part) // 2) for part in _pieces(range(num_columns), n_chunk))


def pipeline_chunk_begin(num_tiles: int, index: int, count: int) -> int:
    """The first position of the index-th of `count` even parts of layer0's order."""
    return num_tiles * index // count


def best_raster_group(num_sms: int, gpu_sms: int, inner: int) -> int:
    """Column tiles that a stretch of one expert's M-tiles takes before the next ones; even.

    What all SMs compute at one time should be about as many rows as columns: then they read the
    fewest operands. Up to twice as many columns, if the weights of a group stay in these SMs' part
    of the cache meanwhile.

    Args:
        num_sms, gpu_sms: that compute; of the GPU.
        inner: K.
    """
    square = max(1, math.isqrt(num_sms // 2))
    kept = _KEPT_BYTES * num_sms // gpu_sms // (2 * BLOCK_N * inner)
    return max(2, max(square, min(kept, 2 * square)) // 2 * 2)


def make_tile_order(
    plan: Plan,
    num_columns: int,
    *,
    backwards: bool = False,
    n_chunk: int | None = None,
    raster_group: int | None = None,
    part: tuple[int, int] = (0, 1),
) -> np.ndarray:
    """The specification of kernels_cu/schedule/turns.cu.

    The plan's order is cut into stretches where the expert changes. M-tiles of a stretch of more
    than 64 rows go in pairs. All pairs take the first group of column tiles, one a turn, and then
    M-tiles that are left over, two a turn; then the next group: so the weights of a group serve all
    tiles while they are in the cache.

    Args:
        plan: made with block_m = 128.
        num_columns: of `num_n_tiles`.
        backwards: walk the order from its end.
        chunk: walk all of it once for each so many column tiles; None: once for all.
        group: column tiles of a group, within a chunk; even; see `best_raster_group`. None: all of them.
        part: index and number of even parts, in layer0's order; only this one's tiles.

    Returns:
        [turns, 2] of work_tile_dtype.
    """
    order = plan.dispatch_order()
    index, count = part
    order = order[
        pipeline_chunk_begin(len(order), index, count) : pipeline_chunk_begin(
            len(order), index + 1, count
        )
    ]
    order = order[::-1] if backwards else order
    items: list[tuple[int, ...]] = []
    for columns in _pieces(range(num_columns), n_chunk):
        for expert, tiles in itertools.groupby(order, key=lambda tile: int(plan.tile_expert[tile])):
            for some_tiles, some_columns in _walk(plan, expert, list(tiles), columns, raster_group):
                items += _turn(plan, expert, some_tiles, some_columns)
    return np.array(items, work_tile_dtype).reshape(-1, 2)


def _pieces(columns: range, size: int | None) -> list[range]:
    step = size or max(1, len(columns))
    return [columns[first : first + step] for first in range(0, len(columns), step)]


def _rows(plan: Plan, expert: int, tile: int) -> int:
    end = int(plan.expert_offsets[expert] + plan.expert_rows[expert])
    return min(BLOCK_M, end - tile * BLOCK_M)


def _walk(
    plan: Plan, expert: int, tiles: list[int], columns: range, raster_group: int | None
) -> Iterator[tuple[list[int], range]]:
    """M-tiles and column tiles of each turn of a stretch."""
    large = [tile for tile in tiles if _rows(plan, expert, tile) > BLOCK_M // 2]
    pairs = [large[i : i + 2] for i in range(0, len(large) - 1, 2)]
    paired = [tile for pair in pairs for tile in pair]
    for some in _pieces(columns, raster_group):
        for pair in pairs:
            for column in _pieces(some, 1):
                yield pair, column
        for tile in tiles:
            if tile not in paired:
                for both in _pieces(some, 2):
                    yield [tile], both


def _turn(plan: Plan, expert: int, tiles: list[int], columns: range) -> list[tuple[int, ...]]:
    """Both CTAs' items; one that is left over has nothing to do."""
    items: list[tuple[int, ...]] = []
    for m, tile in enumerate(tiles):
        rows = _rows(plan, expert, tile)
        for n, column in enumerate(columns):
            a = _loads(n, len(columns), first_only=rows <= BLOCK_M // 2)
            items.append((tile, column, expert, rows, a | _loads(m, len(tiles)) << 2))
    return items + [(-1, 0, 0, 0, 0)] * (2 - len(items))


def _loads(place: int, readers: int, *, first_only: bool = False) -> int:
    """What a CTA loads of an operand: 3, all there is, for itself; else 1, the first half for both
    CTAs, 2, the second half for both, or 0.

    Args:
        place: among its readers.
        first_only: there is no second half.
    """
    if readers == 1:
        return 3
    return (1, 0 if first_only else 2)[place]
