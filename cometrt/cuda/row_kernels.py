"""The launches of kernels_cu/sequential/rows.cu, which move rows: for all of a call or for one
pipeline chunk, on all SMs or beside a GEMM."""

from __future__ import annotations

import numpy as np

from cometrt.cuda.engine import gemm_ctas
from cometrt.cuda.links import Links
from cometrt.cuda.types import Launches
from cometrt.kernels.constants import PULL_WARPS
from cometrt.kernels.launch import load_kernels
from cometrt.kernels.params import KernelArgument, ParamStruct, pipeline_chunk_params
from cometrt.plan import PlanShape

_STAGE_BYTES = 200 * 1024  # shared memory for rows in flight


class RowKernels:
    """One layer's.

    Args:
        links: what the launches take for the link between ranks.
        kernels: gets "dispatch", "push" and "home_reduce".
        block_order_idx: address of the planner's table; needed for several chunks.
        pipeline_chunks: how many there are.
    """

    def __init__(
        self,
        shape: PlanShape,
        links: Links,
        kernels: Launches,
        block_order_idx: int = 0,
        pipeline_chunks: int = 1,
    ) -> None:
        self._shape, self._links = shape, links
        dispatch, self._push, self._home_reduce = load_kernels(
            "sequential/rows.cu", "dispatch", "push", "home_reduce", macros=links.macros
        )
        self._whole = pipeline_chunk_params(0, 0, 1)
        self._chunks = [
            pipeline_chunk_params(block_order_idx, index, pipeline_chunks)
            for index in range(pipeline_chunks)
        ]
        row_bytes = 2 * shape.geometry.spec.hidden
        lanes = max(1, min(32, _STAGE_BYTES // row_bytes // PULL_WARPS))
        self._lanes = KernelArgument(np.int32(lanes))
        self._dispatch = dispatch.with_shared(PULL_WARPS * lanes * row_bytes)
        kernels |= {
            "dispatch": self._launch_dispatch,
            "push": self._launch_push,
            "home_reduce": self._launch_home_reduce,
        }

    def _launch_dispatch(
        self, stream: int, params: ParamStruct, chunk: int | None = None, sms: int | None = None
    ) -> None:
        """Pull what a pipeline chunk (None: all of the call) is the first to need, on so many SMs
        (None: all)."""
        self._dispatch(
            stream, gemm_ctas(sms), params, self._links.dispatch, self._chunk(chunk), self._lanes
        )

    def _launch_push(
        self, stream: int, params: ParamStruct, chunk: int | None = None, sms: int | None = None
    ) -> None:
        """Push what is complete with a chunk, when all later ones are; arguments as for
        `dispatch`."""
        self._push(stream, gemm_ctas(sms), params, self._links.combine, self._chunk(chunk))

    def _launch_home_reduce(self, stream: int, params: ParamStruct) -> None:
        """Add up at home. Waits for peers. Their tokens are not known here, but they can only make
        blocks larger."""
        blocks = self._shape.config.token_blocks(int(params.fields["num_tokens"][0]))
        if blocks:
            self._home_reduce(stream, blocks, params)

    def _chunk(self, index: int | None) -> ParamStruct:
        return self._whole if index is None else self._chunks[index]
