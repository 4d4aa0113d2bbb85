"""Launches that move rows: dispatch, push, and the sum at home (kernels_cu/exchange/rows.cu), for
all of a call or for one part of layer0's order, on all SMs or beside a GEMM."""

from __future__ import annotations

import numpy as np

from cometrt.kernels.launch import load_kernels
from cometrt.kernels.params import KernelArgument, ParamStruct, pipeline_chunk_params
from cometrt.plan import PlanShape
from cometrt.world.partitions import num_sms

_THREADS, _PUSH_THREADS = 256, 768  # kThreads, kPushThreads of rows.cu
_PULL_WARPS = 4  # kPullWarps
_SLOT_BYTES = 200 * 1024  # of shared memory for rows in flight


class RowKernels:
    """One layer's.

    Args:
        dispatch_link, combine_link: of `link_params`, for what comes and what leaves.
        block_order_idx: address of the planner's table.
        parts: how many there are.
    """

    def __init__(
        self,
        shape: PlanShape,
        dispatch_link: ParamStruct,
        combine_link: ParamStruct,
        block_order_idx: int = 0,
        parts: int = 1,
    ) -> None:
        self._shape, self._dispatch_link, self._combine_link = shape, dispatch_link, combine_link
        self._dispatch, self._push, self._home_reduce = load_kernels(
            "sequential/rows.cu", "dispatch", "push", "home_reduce"
        )
        self._whole = pipeline_chunk_params(0, 0, 1)
        self._parts = [
            pipeline_chunk_params(block_order_idx, index, parts) for index in range(parts)
        ]
        row_bytes = 2 * shape.geometry.spec.hidden
        lanes = max(1, min(32, _SLOT_BYTES // row_bytes // _PULL_WARPS))
        self._lanes, self._slot_bytes = (
            KernelArgument(np.int32(lanes)),
            _PULL_WARPS * lanes * row_bytes,
        )
        self._dispatch.allow_shared(self._slot_bytes)

    def pull(self, call: ParamStruct, part: int | None = None, sms: int | None = None) -> None:
        """What a part (None: the call) is the first to need, on that many SMs (None: all)."""
        self._dispatch(
            _grid(sms),
            _THREADS,
            call,
            self._dispatch_link,
            self._whole if part is None else self._parts[part],
            self._lanes,
            shared_bytes=self._slot_bytes,
        )

    def push(self, call: ParamStruct, part: int | None = None, sms: int | None = None) -> None:
        """What is complete with a part, when all later ones are; arguments as for `pull`."""
        chosen = self._whole if part is None else self._parts[part]
        self._push(_grid(sms), _PUSH_THREADS, call, self._combine_link, chosen)

    def home_reduce(self, call: ParamStruct) -> None:
        """At home: waits for peers."""
        blocks = self._shape.config.token_blocks(int(call.fields["num_tokens"][0]))
        if blocks:
            self._home_reduce((blocks,), _THREADS, call)


def _grid(sms: int | None) -> tuple[int]:
    """CTAs come in pairs; one fills an SM."""
    return ((num_sms() if sms is None else sms) // 2 * 2,)
