"""The forward in parts on two streams, as Tutel and FasterMoE pipeline theirs: a baseline that the
fused kernels are compared with, made of the launches of mode "sequential".

    this stream   pull 0 | up 0 | up 1 .. up n-1 | down n-1 | down n-2 .. down 0 | push 0 | add up
    side stream          | pull 1 .. pull n-1    |          | push n-1 .. push 1 |

A part is a stretch of layer0's order of tiles, all experts' in turn, so that weights are read few
times, whatever the number of parts; cutting tokens in parts, as the originals do, reads all of them
for each. GEMMs leave SMs to what moves rows beside them, and have all when nothing does.
"""

from __future__ import annotations

from typing import Any

from cometrt.cuda.experts import EngineExperts
from cometrt.cuda.row_kernels import RowKernels
from cometrt.kernels.params import ParamStruct
from cometrt.plan import PlanShape
from cometrt.world.partitions import auxiliary_stream, num_sms


class ChunkedForward:
    """One layer's; its launches follow publish and prepare."""

    def __init__(self, shape: PlanShape, experts: EngineExperts, rows: RowKernels) -> None:
        """experts, rows: made for `shape.config.pipeline_chunks`."""
        import cupy as cp

        config = shape.config
        self._experts, self._rows, self._parts = experts, rows, config.pipeline_chunks
        self._side = auxiliary_stream()
        self._comm_sms = comm_sms(num_sms(), config.comm_sms)
        self._compute_sms = num_sms() - self._comm_sms
        self._pulled = [cp.cuda.Event(disable_timing=True) for _ in range(config.pipeline_chunks)]
        self._multiplied = [
            cp.cuda.Event(disable_timing=True) for _ in range(config.pipeline_chunks)
        ]
        self._pushed = cp.cuda.Event(disable_timing=True)

    def __call__(
        self, call: ParamStruct, x_rows: Any, w_up: Any, w_down: Any, z: Any, a: Any, o: Any
    ) -> None:
        import cupy as cp

        main, side, last = cp.cuda.get_current_stream(), self._side, self._parts - 1
        experts, rows = self._experts, self._rows
        rows.pull(call, 0)
        self._pulled[0].record(main)
        side.wait_event(self._pulled[0])
        for part in range(1, self._parts):
            with side:
                rows.pull(call, part, self._comm_sms)
            self._pulled[part].record(side)
        for part in range(self._parts):
            if part > 0:
                main.wait_event(self._pulled[part])
            experts.up(x_rows, w_up, z, a, part, self._compute_sms if part < last else None)
        for part in reversed(range(self._parts)):
            experts.down(a, w_down, o, part, self._compute_sms if part < last else None)
            if part > 0:
                self._multiplied[part].record(main)
                side.wait_event(self._multiplied[part])
                with side:
                    rows.push(call, part, self._comm_sms)
        self._pushed.record(side)
        rows.push(call, 0)
        main.wait_event(self._pushed)
        rows.home_reduce(call)


def comm_sms(sms: int, wanted: int | None) -> int:
    """SMs that move rows beside a GEMM: `wanted`, or about an eighth; even, and some are left."""
    return min(max(2, sms // 16 * 2) if wanted is None else wanted, sms - 2)
