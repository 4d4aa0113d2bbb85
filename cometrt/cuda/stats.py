"""What `finish` tells the host of each call that has succeeded."""

from __future__ import annotations

import numpy as np

from cometrt.cuda.report import pinned
from cometrt.kernels.params import call_stats_dtype
from cometrt.stats import LayerStats, rows_of_experts

_MAX_READS = 1000
_NUM_WAITS = 2  # kNumWaits of protocol/exchange_params.cuh


class DeviceStats:
    """A layer's CallStats, in memory of the host that `finish` writes to.

    Each word has its call's epoch, and is written at once. So the host needs no wait and the device
    no fence: where all words have the same epoch, they are of one call.

    Args:
        local_experts: plan experts of this rank. Each has a word.
        row_sets: as in `Geometry`. `read` adds the rows of an expert in all of them.

    Attributes:
        address: of the words [2 + local_experts], for kernels.
    """

    def __init__(self, local_experts: int, row_sets: int = 1) -> None:
        self._row_sets = row_sets
        # As 64-bit words: NumPy copies a struct field by field, so values and epochs would differ.
        self._words = pinned(call_stats_dtype, _NUM_WAITS + local_experts).view(np.uint64)
        self.address = int(self._words.ctypes.data)
        self._last: LayerStats | None = None

    def read(self) -> LayerStats | None:
        """Of the newest call; None: none has succeeded yet. Where the device writes all the time,
        those of the last `read`."""
        for _ in range(_MAX_READS):
            words = self._words.copy().view(call_stats_dtype)
            epoch = int(words["epoch"][0])
            if (words["epoch"] == epoch).all():
                if epoch == 0:
                    return None
                waits = words["value"][:_NUM_WAITS].view(np.float32)
                rows = rows_of_experts(words["value"][_NUM_WAITS:], self._row_sets)
                self._last = LayerStats(epoch, rows, *map(float, waits))
                break
        return self._last
