"""Layouts of the records in shared memory. Those of the device mirror structs in kernels_cu."""

from __future__ import annotations

import numpy as np

from cometrt.kernels.constants import MAX_RANKS
from cometrt.world.failure import FAILURE_NUMBERS

header_dtype = np.dtype(
    [
        ("epoch", np.int64),
        ("operation", np.int64),
        ("layer", np.int64),
        ("spec_hash", np.int64),
        # Of a backward's forward, or of a planned forward's plan; else 0.
        ("forward_epoch", np.int64),
        ("num_tokens", np.int64),
    ]
)

# On the device, mirrored by kernels_cu/protocol/control_block.cuh.
record_dtype = np.dtype([(name, np.int64) for name in FAILURE_NUMBERS])
device_control_block_dtype = np.dtype(
    [
        ("source_ready", np.uint64, MAX_RANKS),
        ("header", header_dtype, (2, MAX_RANKS)),
        ("failure", record_dtype, MAX_RANKS),
        ("abort", np.uint64, MAX_RANKS),
        ("rail_ready", np.uint64, MAX_RANKS),
        *((name, np.uint64) for name in ("generation", "reported", "epoch", "held", "rail_calls")),
    ]
)
world_dtype = np.dtype(
    [
        ("control", np.uint64, MAX_RANKS),
        ("data", np.uint64, MAX_RANKS),
        ("flags", np.uint64, MAX_RANKS),
        ("routing", np.uint64, (2, MAX_RANKS)),
        ("generation", np.uint64),
        ("timeout_ns", np.uint64),
        ("rank", np.int32),
        ("size", np.int32),
    ]
)
