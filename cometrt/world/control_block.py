"""A rank's control block: the small memory by which ranks see each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from cometrt.world.failure import failure_dtype
from cometrt.world.layout import header_dtype

MESSAGE_BYTES = 1 << 16


def control_block_dtype(size: int) -> np.dtype:
    """One rank's control_block. The comment says who writes a field; its owner reads it, unless said."""
    return np.dtype(
        [
            ("source_ready", np.int64, size),  # [s]: rank s
            ("header", header_dtype, (2, size)),  # [epoch parity, s]: rank s
            ("abort", np.int64, 1),  # any rank: the generation it stops
            ("failure", failure_dtype, size),  # [r]: rank r
            ("generation", np.int64, 1),  # the owner; all read
            ("epoch", np.int64, 1),  # the owner; all read, in reset
            ("reset_request", np.int64, 1),  # the owner; all read
            ("closing", np.int64, 1),  # the owner, -1 if it will not come; all read
            ("sequence", np.int64, 1),  # the owner; all read
            ("message_bytes", np.int64, 2),  # [round parity]: the owner; all read
            ("message", np.uint8, (2, MESSAGE_BYTES)),  # likewise
        ]
    )


def value_of(flags: np.ndarray, index: int | tuple[int, ...] = 0) -> Callable[[], Any]:
    """Reads one flag anew at each call; for `World.wait`."""
    return lambda: flags[index]
