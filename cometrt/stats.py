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

    Over several nodes rows and waited_us are sums over the slices of a call (see
    `TileConfig.rail_slices`), and epoch is that of the last one.
    """

    epoch: int
    rows: np.ndarray
    waited_us: float


def sum_stats(slices: list[LayerStats]) -> LayerStats:
    """Of a call, from those of its slices."""
    rows = np.sum([of.rows for of in slices], axis=0)
    return LayerStats(slices[-1].epoch, rows, sum(of.waited_us for of in slices))
