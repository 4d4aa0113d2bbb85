"""The order of a GEMM's tiles as data: what each cluster of two CTAs computes, turn by turn.

Both CTAs of a turn read one operand in common, which each then loads half of for both: two
M-tiles of one expert against the same columns of its weights (they share B), or one M-tile
against two neighbouring column tiles (they share A).
"""

from __future__ import annotations

import itertools
import math

import numpy as np

from cometrt.plan.config import ENGINE_BLOCK_M, ENGINE_BLOCK_N
from cometrt.plan.tables import Plan

BLOCK_M, BLOCK_N = ENGINE_BLOCK_M, ENGINE_BLOCK_N
CLUSTER_SIZE = 2  # kClusterSize of kernels_cu/gemm/tile.cuh
SHARES_NOTHING, SHARES_A, SHARES_B = range(3)
_KEPT_BYTES = 20 << 20  # of the cache, for weights that are read again

work_item_dtype = np.dtype(
    [
        ("tile", np.int32),  # M-tile; -1: nothing to do
        ("column", np.int32),  # N-tile
        ("expert", np.int32),
        ("rows", np.uint16),  # of the M-tile, without pads
        ("sharing", np.uint16),
    ]
)


def column_tiles(columns: int, *, gated: bool) -> int:
    """N-tiles of a result of that many columns; a gated tile has half, from gate and from up."""
    return -(-columns // (BLOCK_N // 2 if gated else BLOCK_N))


def most_turns(
    max_tiles: int, num_columns: int, chunk: int | None = None, group: int | None = None
) -> int:
    """Turns of the worst order: every M-tile alone, in every walk over a group of columns."""
    return max_tiles * sum(-(-len(piece) // 2) for piece in _groups(num_columns, chunk, group))


def part_begin(num_tiles: int, index: int, count: int) -> int:
    """The first position of the index-th of `count` even parts of layer0's order."""
    return num_tiles * index // count


def best_group(num_sms: int, gpu_sms: int, inner: int) -> int:
    """Column tiles that a stretch of one expert's M-tiles takes before the next ones.

    What all SMs compute at one time should be about as many rows as columns: then they read the
    fewest operands. Up to twice as many columns, if the weights of a group stay in these SMs' part
    of the cache meanwhile.

    Args:
        num_sms, gpu_sms: that compute; of the GPU.
        inner: K.
    """
    square = max(1, math.isqrt(num_sms // CLUSTER_SIZE))
    kept = _KEPT_BYTES * num_sms // gpu_sms // (2 * BLOCK_N * inner)
    return max(square, min(kept, 2 * square))


def make_turns(
    plan: Plan,
    num_columns: int,
    *,
    max_run: int = 2,
    backwards: bool = False,
    chunk: int | None = None,
    group: int | None = None,
    part: tuple[int, int] = (0, 1),
) -> np.ndarray:
    """The specification of kernels_cu/schedule/turns.cu.

    The plan's order is cut into stretches where the expert changes. A stretch is walked once for
    each group of column tiles, so that the weights of a group serve all its tiles while they are in
    the cache; it is cut into even runs of at most about `max_run` tiles. A run takes two column
    tiles at a time: first its tiles of more than 64 rows, in pairs, for the one and for the other;
    then what is left, alone, for both.

    Args:
        plan: made with block_m = 128.
        num_columns: of `column_tiles`.
        backwards: walk the order from its end.
        chunk: walk all of it once for each so many column tiles; None: once for all.
        group: column tiles of a group, within a chunk; see `best_group`. None: all of them.
        part: index and number of even parts, in layer0's order; only this one's tiles.

    Returns:
        [turns, 2] of work_item_dtype.
    """
    order = plan.layer0_tiles()
    index, count = part
    order = order[part_begin(len(order), index, count) : part_begin(len(order), index + 1, count)]
    order = order[::-1] if backwards else order
    items: list[tuple[int, ...]] = []  # two a turn
    for columns in _pieces(range(num_columns), chunk):
        items += _walk(plan, order, _pieces(columns, group), max_run)
    return np.array(items, work_item_dtype).reshape(-1, 2)


def _pieces(columns: range, size: int | None) -> list[range]:
    step = size or len(columns)
    return [columns[first : first + step] for first in range(0, len(columns), step)]


def _groups(num_columns: int, chunk: int | None, group: int | None) -> list[range]:
    return [
        part for columns in _pieces(range(num_columns), chunk) for part in _pieces(columns, group)
    ]


def _walk(plan: Plan, order: list[int], groups: list[range], max_run: int) -> list[tuple[int, ...]]:
    items = []
    for expert, stretch in itertools.groupby(order, key=lambda tile: int(plan.tile_expert[tile])):
        tiles = list(stretch)
        pieces = -(-len(tiles) // max_run)
        length = -(-len(tiles) // (2 * pieces)) * 2
        runs = [tiles[begin : begin + length] for begin in range(0, len(tiles), length)]
        for columns in groups:
            for run in runs:
                items += _run(plan, expert, run, columns)
    return items


def _run(plan: Plan, expert: int, run: list[int], columns: range) -> list[tuple[int, ...]]:
    end = int(plan.expert_offsets[expert] + plan.expert_rows[expert])
    rows = {tile: min(BLOCK_M, end - tile * BLOCK_M) for tile in run}
    large = [tile for tile in run if rows[tile] > BLOCK_M // 2]
    paired = large[: len(large) // 2 * 2]
    singles = [tile for tile in run if tile not in paired]

    def item(tile: int, column: int, sharing: int) -> tuple[int, ...]:
        return (tile, column, expert, rows[tile], sharing)

    items = []
    for first in columns[::2]:
        both = range(first, min(first + 2, columns.stop))
        for column in both:
            items += [item(tile, column, SHARES_B) for tile in paired]
        for tile in singles:
            if len(both) == 2:
                items += [item(tile, column, SHARES_A) for column in both]
            else:
                items += [item(tile, first, SHARES_NOTHING), (-1, 0, 0, 0, SHARES_NOTHING)]
    return items
