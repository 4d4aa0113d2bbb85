"""NumPy mirrors of kernels_cu/nodes/rail_params.cuh, as in `cometrt.kernels.params`."""

from __future__ import annotations

import numpy as np

from cometrt.plan.config import MAX_RAIL_SLICES
from cometrt.world.layout import world_dtype

header_dtype = np.dtype(
    [(name, np.int64) for name in "operation layer spec_hash forward epoch".split()]
    + [("unused", np.int64, 3)]
)
outcome_dtype = np.dtype(
    [(name, np.uint64) for name in "kind largest_need wrong_pair unused".split()]
)
report_dtype = np.dtype([(name, np.uint64) for name in "kind node largest_need wrong_pair".split()])
params_dtype = np.dtype(
    [("world", world_dtype)]
    + [(name, np.int64) for name in "operation layer spec_hash forward".split()]
    + [
        (name, np.uint64)
        for name in (
            "state progress report part_sums steps rows all_rows ids weights messages "
            "message_bytes all_ids all_weights slots counts wanted_rows crossing_rows outgoing "
            "partials returned out dweight_partials "
            "returned_dweight out_dweight outcomes"
        ).split()
    ]
    + [("epochs", np.uint64, MAX_RAIL_SLICES)]
    + [
        (name, np.int32)
        for name in (
            "nodes node max_tokens topk hidden num_tokens num_experts id_bytes part_tokens "
            "num_epochs slice ends begins own others crossing "
            "num_parts local_experts part unused"
        ).split()
    ]
)
