"""The forward by kernels that do one thing each, all on one stream: dispatch, the engine's two
GEMMs, push, home_reduce. In pipeline chunks on two streams: `ChunkedForward`."""

from __future__ import annotations

from cometrt.cuda.engine import GemmArguments, gemm_ctas, gemm_kernel, layer_orders
from cometrt.cuda.exchange_params import Call
from cometrt.cuda.types import Launches
from cometrt.kernels.params import ParamStruct
from cometrt.plan import PlanShape, TileConfig
from cometrt.world.partitions import auxiliary_stream, num_sms


class ExpertGemms:
    """The forward's GEMMs of all experts. The device alone knows how many rows each has.

    Args:
        ok: address of ExchangeState.ok.
        kernels: gets "up" and "down".
        pipeline_chunks: how many; each may be a launch of its own.

    Attributes:
        orders: TileOrderParams of the up and the down GEMM.
    """

    def __init__(
        self, shape: PlanShape, ok: int, kernels: Launches, pipeline_chunks: int = 1
    ) -> None:
        geometry, spec = shape.geometry, shape.geometry.spec
        width, experts, rows = geometry.local_intermediate, geometry.num_weights, shape.capacity
        self._tile_orders = up, down = layer_orders(shape, pipeline_chunks=pipeline_chunks)
        self.orders = up.params, down.params
        chunks = range(pipeline_chunks)
        self._up = [
            GemmArguments(
                up, rows, spec.hidden, width, experts,
                gated=spec.gated, ok=ok, pipeline_chunk=chunk,
            )
            for chunk in chunks
        ]  # fmt: skip
        self._down = [
            GemmArguments(down, rows, width, spec.hidden, experts, ok=ok, pipeline_chunk=chunk)
            for chunk in chunks
        ]
        self._up_kernels = [gemm_kernel(spec.activation, write_z) for write_z in (False, True)]
        self._down_kernel = gemm_kernel(None, False)
        kernels |= {"up": self._launch_up, "down": self._launch_down}

    def _launch_up(self, stream: int, call: Call, chunk: int = 0, sms: int | None = None) -> None:
        """a, and z in training, from x_rows; on so many SMs (None: all)."""
        at = call.at
        z = at.get("z", 0)
        arguments = self._up[chunk](at["x_rows"], at["w_up"], at["a"], z)
        self._up_kernels[bool(z)](stream, gemm_ctas(sms), *arguments)

    def _launch_down(self, stream: int, call: Call, chunk: int = 0, sms: int | None = None) -> None:
        """o from a; on so many SMs (None: all)."""
        arguments = self._down[chunk](call.at["a"], call.at["w_down"], call.at["o"])
        self._down_kernel(stream, gemm_ctas(sms), *arguments)


class SequentialForward:
    """One launch after the other, of ExpertGemms and RowKernels."""

    def launch(self, kernels: Launches, stream: int, params: ParamStruct, call: Call) -> None:
        kernels["dispatch"](stream, params)
        kernels["up"](stream, call)
        kernels["down"](stream, call)
        kernels["push"](stream, params)
        kernels["home_reduce"](stream, params)


class ChunkedForward:
    """The same launches for each pipeline chunk, as Tutel and FasterMoE pipeline theirs: a baseline
    for the fused kernels.

        this stream       dispatch 0 | up 0 .. up n-1 | down n-1 .. down 0 | push 0 | home_reduce
        auxiliary stream  | dispatch 1 .. n-1 |          | push n-1 .. push 1 |

    A pipeline chunk is a range of the dispatch order, across all experts: weights are read few
    times, whatever the number of chunks. The originals cut the tokens, and read all weights for
    each chunk. GEMMs leave SMs to the kernels that move rows beside them.

    A planned forward pushes all chunks in one launch after the last GEMM: what each chunk completes
    is in the planner's scratch, and not in the plan.
    """

    def __init__(self, config: TileConfig) -> None:
        import cupy as cp

        self._count = count = config.pipeline_chunks
        self._auxiliary = int(auxiliary_stream().ptr)
        self._comm_sms = comm_sms(num_sms(), config.comm_sms)
        self._gemm_sms = num_sms() - self._comm_sms
        self._dispatched = [cp.cuda.Event(disable_timing=True) for _ in range(count)]
        self._multiplied = [cp.cuda.Event(disable_timing=True) for _ in range(count)]
        self._pushed = cp.cuda.Event(disable_timing=True)

    def launch(self, kernels: Launches, stream: int, params: ParamStruct, call: Call) -> None:
        from cupy.cuda.runtime import eventRecord as record
        from cupy.cuda.runtime import streamWaitEvent as wait

        try:
            self._launch_chunks(kernels, stream, params, call)
        finally:  # the call's end covers both streams, also where a launch fails
            record(self._pushed.ptr, self._auxiliary)
            wait(stream, self._pushed.ptr)
        kernels["home_reduce"](stream, params)

    def _launch_chunks(
        self, kernels: Launches, stream: int, params: ParamStruct, call: Call
    ) -> None:
        from cupy.cuda.runtime import eventRecord as record
        from cupy.cuda.runtime import streamWaitEvent as wait

        other, last = self._auxiliary, self._count - 1
        planned = call.operation == "planned forward"
        kernels["dispatch"](stream, params, 0)
        record(self._dispatched[0].ptr, stream)
        wait(other, self._dispatched[0].ptr)
        for chunk in range(1, self._count):
            kernels["dispatch"](other, params, chunk, self._comm_sms)
            record(self._dispatched[chunk].ptr, other)
        for chunk in range(self._count):
            if chunk > 0:
                wait(stream, self._dispatched[chunk].ptr)
            kernels["up"](stream, call, chunk, self._gemm_sms if chunk < last else None)
        for chunk in reversed(range(self._count)):
            alone = planned or chunk == last
            kernels["down"](stream, call, chunk, None if alone else self._gemm_sms)
            if chunk > 0 and not planned:
                record(self._multiplied[chunk].ptr, stream)
                wait(other, self._multiplied[chunk].ptr)
                kernels["push"](other, params, chunk, self._comm_sms)
        kernels["push"](stream, params, None if planned else 0)


def comm_sms(sms: int, wanted: int | None) -> int:
    """SMs that move rows beside a GEMM: `wanted`, or about an eighth; even, and some are left."""
    return min(max(2, sms // 16 * 2) if wanted is None else wanted, sms - 2)
