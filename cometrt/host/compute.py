"""The compute role: the expert GEMMs, tile by tile in plan order, accumulated in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from cometrt.activations import activate, activate_backward
from cometrt.host.exchange import Exchange


class ExpertWeights:
    """Weights [E_l, N, K] of one GEMM, by plan expert. An expert's are converted to float32 at its
    first use."""

    def __init__(self, weights: np.ndarray) -> None:
        self._weights = weights
        self._wide: dict[int, np.ndarray] = {}

    def __getitem__(self, expert: int) -> np.ndarray:
        expert %= len(self._weights)
        if expert not in self._wide:
            self._wide[expert] = self._weights[expert].astype(np.float32)
        return self._wide[expert]


def up_tiles(
    ex: Exchange, x_rows: np.ndarray, w_up: ExpertWeights, z: np.ndarray, a: np.ndarray
) -> None:
    """z = x w_up^T and a = act(z), in dispatch order. Waits for tile_filled.

    a is computed from the rounded z, so that backward recomputes the same bits.
    """
    for tile in ex.plan.dispatch_order():
        ex.wait_filled("x", tile)
        with ex.step("compute", "up", tile):
            rows, expert = _rows(ex, tile)
            x = x_rows[rows].astype(np.float32)
            for columns, z_columns in _activation_tiles(ex):
                z_tile = (x @ w_up[expert][z_columns].T).astype(z.dtype)
                z[rows, z_columns] = z_tile
                a[rows, columns] = _activate(ex, z_tile).astype(a.dtype)


def down_tiles(ex: Exchange, a: np.ndarray, w_down: ExpertWeights, o: np.ndarray) -> None:
    """o = a w_down^T, in combine order. Signals tile_done."""
    _output_tiles(ex, "down", a, o, lambda expert, columns: w_down[expert][columns].T)


def down_dgrad_tiles(
    ex: Exchange,
    dy_rows: np.ndarray,
    w_down: ExpertWeights,
    z: np.ndarray,
    dz: np.ndarray,
    weighted_a: np.ndarray,
    dweight_rows: np.ndarray,
) -> None:
    """da' = dy w_down and its epilogue, in dispatch order. Waits for tile_filled.

    Epilogue: dweight = <da', a>, dz = dact(z, weight * da'), weighted_a = weight * a.
    """
    for tile in ex.plan.dispatch_order():
        ex.wait_filled("dy", tile)
        with ex.step("compute", "down dgrad", tile):
            rows, expert = _rows(ex, tile)
            dy = dy_rows[rows].astype(np.float32)
            weight = ex.plan.row_weight[rows, None]
            dweight_rows[rows] = 0
            for columns, z_columns in _activation_tiles(ex):
                da = dy @ w_down[expert][:, columns]
                z_tile = z[rows, z_columns].astype(np.float32)
                a = _activate(ex, z_tile).astype(z.dtype).astype(np.float32)
                dweight_rows[rows] += (da * a).sum(axis=1)
                activation = ex.shape.geometry.spec.activation
                dz[rows, z_columns] = activate_backward(activation, z_tile, weight * da)
                weighted_a[rows, columns] = weight * a


def up_dgrad_tiles(ex: Exchange, dz: np.ndarray, w_up: ExpertWeights, dx: np.ndarray) -> None:
    """dx rows = dz w_up, in combine order. Signals tile_done."""
    _output_tiles(ex, "up dgrad", dz, dx, lambda expert, columns: w_up[expert][:, columns])


def wgrad_tiles(
    ex: Exchange,
    dz: np.ndarray,
    x_rows: np.ndarray,
    dy_rows: np.ndarray,
    weighted_a: np.ndarray,
    dw_up: np.ndarray,
    dw_down: np.ndarray,
) -> None:
    """dw_up[e] = dz^T x and dw_down[e] = dy^T (weight * a) over the rows of expert e, in float32,
    summed over row sets.

    Padding rows are zero in all four operands and may be included. Unless save="rows", backward
    pulls x again, so this waits for tile_filled of x.
    """
    plan, block_m = ex.plan, ex.shape.config.block_m
    for expert in range(len(plan.expert_rows)):
        begin, end = (int(row) for row in plan.expert_offsets[expert : expert + 2])
        if ex.shape.geometry.spec.save != "rows":
            for tile in range(begin // block_m, end // block_m):
                ex.wait_filled("x", tile)
        with ex.step("compute", "wgrad", expert):
            rows = slice(begin, end)
            for out, a, b in ((dw_up, dz, x_rows), (dw_down, dy_rows, weighted_a)):
                product = a[rows].astype(np.float32).T @ b[rows].astype(np.float32)
                weight, of_first_set = expert % len(out), expert < len(out)
                out[weight] = product if of_first_set else out[weight] + product


def _output_tiles(
    ex: Exchange,
    name: str,
    a: np.ndarray,
    out: np.ndarray,
    operand: Callable[[int, slice], np.ndarray],
) -> None:
    """out = a b with b = operand(expert, columns). For each N-chunk, M-tiles in combine order."""
    for chunk, (begin, end) in enumerate(ex.n_chunks):
        for tile in ex.plan.combine_order():
            with ex.step("compute", name, tile):
                rows, expert = _rows(ex, tile)
                a_tile = a[rows].astype(np.float32)
                for lo, hi in ex.shape.config.n_tiles(begin, end):
                    out[rows, lo:hi] = a_tile @ operand(expert, slice(lo, hi))
                    ex.tile_done[tile, chunk] += 1


def _rows(ex: Exchange, tile: int) -> tuple[slice, int]:
    """(rows, expert) of an M-tile."""
    block_m = ex.shape.config.block_m
    return slice(tile * block_m, (tile + 1) * block_m), int(ex.plan.tile_expert[tile])


def _activation_tiles(ex: Exchange) -> Iterator[tuple[slice, slice | np.ndarray]]:
    """(columns of a, columns of z that they depend on): if gated, of gate and of up."""
    intermediate = ex.shape.geometry.local_intermediate
    for lo, hi in ex.shape.config.n_tiles(0, intermediate):
        columns = np.arange(lo, hi)
        gated = np.concatenate([columns, intermediate + columns])
        yield slice(lo, hi), gated if ex.shape.geometry.spec.gated else slice(lo, hi)


def _activate(ex: Exchange, z_tile: np.ndarray) -> np.ndarray:
    return activate(ex.shape.geometry.spec.activation, z_tile.astype(np.float32))
