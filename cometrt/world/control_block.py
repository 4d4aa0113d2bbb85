"""The control block of a rank on the host: flags, headers, failure records and a message."""

from __future__ import annotations

from collections.abc import Callable
from typing import SupportsInt

import numpy as np

from cometrt.world.failure import failure_dtype
from cometrt.world.layout import header_dtype

MESSAGE_BYTES = 1 << 16


def control_block_dtype(size: int) -> np.dtype:
    """The control block in a world of `size` ranks.

    Peers write the first four fields and the owner reads them. The owner writes the other fields
    and all ranks read them.
    """
    return np.dtype(
        [
            ("source_ready", np.int64, size),  # [s]: epoch, written by rank s
            ("header", header_dtype, (2, size)),  # [epoch parity, s]: written by rank s
            ("abort", np.int64, 1),  # the generation that any rank has stopped
            ("failure", failure_dtype, size),  # [r]: written by rank r
            ("generation", np.int64, 1),
            ("epoch", np.int64, 1),
            ("reset_request", np.int64, 1),  # the generation that the owner asks for; 0: none
            ("closing", np.int64, 1),  # step of closing; 0: open, -1: left without closing
            ("sequence", np.int64, 1),  # sequence number of the last message
            ("message_bytes", np.int64, 2),  # [sequence parity]: size of the whole payload
            ("message", np.uint8, (2, MESSAGE_BYTES)),  # [sequence parity]
        ]
    )


def value_of(flags: np.ndarray, index: int | tuple[int, ...] = 0) -> Callable[[], SupportsInt]:
    """A function that reads one flag anew at each call, for `World.wait`."""
    return lambda: flags[index]
