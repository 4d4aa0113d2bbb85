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
    """

    epoch: int
    rows: np.ndarray
    waited_us: float
