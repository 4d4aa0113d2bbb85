"""`LayerStats`: what a trainer logs of a layer's calls."""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class LayerStats:
    """One call of a layer on one rank.

    Attributes:
        epoch: the number of the exchange, which is equal on all ranks; on "cuda" modulo 2^32.
        rows: [E_l] int64, rows of each local expert, without padding rows.
        waited_us: microseconds that this rank waited, doing nothing else, until all ranks had begun
            the call. The last rank to begin has 0: the others wait for it. Waits below 1 us do not
            count.
        rows_waited_us: microseconds that the GEMMs waited in mode "fused" for rows on their way to
            this rank; on "cuda" the mean over the SMs. A GEMM loads ahead, so it may have
            multiplied an earlier tile meanwhile. 0 in other modes, where a GEMM begins once all
            rows are there, and not measured (0) on "cuda" with an emulated link.

    Other waits do not count: comm waits for GEMMs and for peers most of the time, and delays
    nothing by it. `cometrt.trace` shows them.

    Over several nodes rows, waited_us and rows_waited_us are sums over the slices of a call (see
    `TileConfig.rail_slices`), and epoch is that of the last one.
    """

    epoch: int
    rows: np.ndarray
    waited_us: float
    rows_waited_us: float


def rows_of_experts(rows: np.ndarray, row_sets: int) -> np.ndarray:
    """[E_l] int64, rows of each local expert, from those of a rank's plan experts."""
    return rows.reshape(row_sets, -1).sum(axis=0, dtype=np.int64)


def sum_stats(slices: list[LayerStats]) -> LayerStats:
    """Of a call, from those of its slices."""
    return LayerStats(
        epoch=slices[-1].epoch,
        rows=np.sum([of.rows for of in slices], axis=0),
        waited_us=sum(of.waited_us for of in slices),
        rows_waited_us=sum(of.rows_waited_us for of in slices),
    )
