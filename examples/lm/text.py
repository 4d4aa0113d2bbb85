"""The text: bytes of the source files of Python's standard library."""

from __future__ import annotations

import numpy as np

from cometrt.cli.inputs import standard_library


class Text:
    """Batches of consecutive bytes. A batch depends on seed and step alone, so that a run that was
    resumed, or that has other ranks, reads the same text."""

    def __init__(self, sequence: int, batch: int, seed: int, num_bytes: int = 1 << 20) -> None:
        self._bytes = standard_library(num_bytes).astype(np.int32)
        self._sequence, self._batch, self._seed = sequence, batch, seed

    def batch(self, step: int) -> np.ndarray:
        """[B, S + 1] int32 of all ranks; byte s + 1 is the target of byte s."""
        rng = np.random.default_rng((self._seed, step))
        starts = rng.integers(len(self._bytes) - self._sequence, size=(self._batch, 1))
        return self._bytes[starts + np.arange(self._sequence + 1)]
