"""The order of a GEMM's tiles as data: what each cluster of two CTAs computes, turn by turn.

Both CTAs of a turn read one operand in common, which each then loads half of for both: two
M-tiles of one expert against the same columns of its weights (they share B), or one M-tile
against two neighbouring column tiles (they share A).
"""

from __future__ import annotations

import numpy as np

from cometrt.plan.tables import Plan

BLOCK_M, BLOCK_N = 128, 256  # of kernels_cu/gemm/tile.cuh
MAX_RUN = 16  # divides 1024, the threads of the kernel that does this on the device
SHARES_NOTHING, SHARES_A, SHARES_B = range(3)

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


def most_turns(max_tiles: int, num_columns: int) -> int:
    """Turns of the worst order: every M-tile alone."""
    return max_tiles * (-(-num_columns // 2))


def make_turns(
    plan: Plan, num_columns: int, *, backwards: bool = False, max_run: int = MAX_RUN
) -> np.ndarray:
    """The specification of kernels_cu/schedule/turns.cu.

    The plan's order is cut into runs of tiles of one expert, at multiples of `max_run` too. Within
    a run all tiles take one column tile after the other, so that what is computed at one time
    reads few rows and few columns. Tiles of more than 64 rows go in pairs; what is left goes
    alone, behind them, two column tiles at a time.

    Args:
        plan: made with block_m = 128.
        num_columns: of `column_tiles`.
        backwards: walk the order from its end.

    Returns:
        [turns, 2] of work_item_dtype.
    """
    order = plan.layer0_tiles()[::-1] if backwards else plan.layer0_tiles()
    begins = [
        p
        for p in range(len(order))
        if p % max_run == 0 or plan.tile_expert[order[p]] != plan.tile_expert[order[p - 1]]
    ]
    items: list[tuple[int, ...]] = []  # two a turn
    for begin, end in zip(begins, [*begins[1:], len(order)], strict=True):
        run = order[begin:end]
        expert = int(plan.tile_expert[run[0]])
        last_row = int(plan.expert_offsets[expert] + plan.expert_rows[expert])
        rows = {tile: min(BLOCK_M, last_row - tile * BLOCK_M) for tile in run}
        large = [tile for tile in run if rows[tile] > BLOCK_M // 2]
        paired = large[: len(large) // 2 * 2]

        def item(tile: int, column: int, sharing: int) -> tuple[int, ...]:
            return (tile, column, expert, rows[tile], sharing)  # noqa: B023

        for column in range(num_columns):
            for one, two in zip(paired[::2], paired[1::2], strict=True):
                items += [item(one, column, SHARES_B), item(two, column, SHARES_B)]
        for tile in [tile for tile in run if tile not in paired]:
            for column in range(0, num_columns, 2):
                if column + 1 < num_columns:
                    items += [item(tile, column, SHARES_A), item(tile, column + 1, SHARES_A)]
                else:
                    items += [item(tile, column, SHARES_NOTHING), (-1, 0, 0, 0, 0)]
    return np.array(items, work_item_dtype).reshape(-1, 2)
