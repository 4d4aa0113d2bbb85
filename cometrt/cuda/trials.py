"""Trials of the tuner: the time of a fused forward with a given config, on the slowest rank."""

from __future__ import annotations

import math
import statistics
from typing import Any

import numpy as np

from cometrt.cuda.engine import current_stream
from cometrt.cuda.executor import CudaExecutor
from cometrt.errors import CallNotBegun
from cometrt.kernels.launch import load_kernels
from cometrt.plan import PlanShape, TileConfig
from cometrt.specs import Geometry
from cometrt.trace import NullTracer
from cometrt.world import World

_ROUNDS, _CALLS = 5, 3  # _CALLS: timed calls of a round, back to back
_RANDOM_VALUES = 1 << 22


class Trials:
    """Times forwards of one layer with any config, all ranks together.

    Args:
        layer: number of the layer, which headers name.
        inputs: forward's five arrays, checked; None: random ones of max_tokens tokens a rank, with
            the same number of rows for every expert.
        training: whether forwards keep residuals.
    """

    def __init__(
        self,
        world: World,
        geometry: Geometry,
        layer: int,
        inputs: tuple[Any, ...] | None,
        training: bool,
    ) -> None:
        import cupy as cp

        self._world, self._geometry, self._layer = world, geometry, layer
        self._training, self._tracer = training, NullTracer()
        self._inputs = _random_inputs(geometry) if inputs is None else inputs
        self._y = cp.empty_like(self._inputs[0])
        self._events = cp.cuda.Event(), cp.cuda.Event()
        self._barrier = StartBarrier(world.timeout_sec)

    def executor(self, config: TileConfig) -> CudaExecutor:
        """An executor with this config. Collective."""
        shape = PlanShape(self._geometry, config)
        return CudaExecutor(self._world, shape, self._layer, "fused")

    def time(self, config: TileConfig) -> float:
        """Milliseconds of a forward: median of rounds, the same on all ranks. Collective.

        Raises:
            RoutingError, CapacityError: for given inputs, on all ranks.
        """
        # All ranks have met in the last trial's allgather, and meet again before this trial's first
        # launch. So no kernel waits for a peer while memory is allocated.
        executor = self.executor(config)
        executor.graphs.enabled = False  # no graph may be captured behind the start barrier
        try:
            return self._time(executor)
        except BaseException:
            executor.retire()  # its kernels may run on
            raise

    def _time(self, executor: CudaExecutor) -> float:
        import cupy as cp

        world, (begin, end) = self._world, self._events
        self.calls(executor)  # allocates all memory that later calls use
        executor.synchronize()
        world.barrier()
        times = []
        for _ in range(_ROUNDS):
            # The device begins when the host has queued all calls. Otherwise the host's time would
            # count, and ranks that share a GPU meet on the host in each call. The first call is
            # not timed: ranks leave the start barrier at different times but end that call
            # together.
            self._barrier.close()
            try:
                self.calls(executor)
                world.barrier()
            finally:
                self._barrier.open()
            end.synchronize()
            times.append(cp.cuda.get_elapsed_time(begin, end) / _CALLS)
        executor.synchronize()
        ranks = world.allgather(times, purpose="tune")
        return statistics.median(max(times) for times in zip(*ranks, strict=True))

    def calls(self, executor: CudaExecutor) -> None:
        """Queue one call, then _CALLS calls between the two events. Results are dropped."""
        begin, end = self._events
        try:
            for index in range(1 + _CALLS):
                if index == 1:
                    begin.record()
                executor.forward(
                    *self._inputs, training=self._training, out=self._y, tracer=self._tracer
                )
        except CallNotBegun as error:
            raise error.reason from None
        end.record()


class StartBarrier:
    """Holds the current stream. Work queued behind `close` begins after `open`, or timeout_sec."""

    def __init__(self, timeout_sec: float) -> None:
        import cupy as cp

        self._memory = cp.cuda.alloc_pinned_memory(8)
        self._flag = np.frombuffer(self._memory, np.uint64, 1)
        self._timeout_ns = np.uint64(timeout_sec * 1e9)
        (self._kernel,) = load_kernels("protocol/start_barrier.cu", "start_barrier")

    def close(self) -> None:
        """Hold the stream. Work queued behind the last `close` must have ended."""
        self._flag[0] = 0
        address = np.uint64(self._memory.ptr)
        self._kernel(current_stream(), 1, address, self._timeout_ns)

    def open(self) -> None:
        """Let the work begin."""
        self._flag[0] = 1


def balanced_ids(geometry: Geometry) -> np.ndarray:
    """[max_tokens, K] int32: distinct experts for each of this rank's tokens.

    Over all ranks, every expert is chosen equally often, to within K.
    """
    spec = geometry.spec
    experts, topk = spec.num_experts, spec.topk
    token = geometry.rank * spec.max_tokens + np.arange(spec.max_tokens, dtype=np.int64)
    # E consecutive tokens begin at E different experts. All take the same stride through the
    # experts, which is coprime to E.
    strides = np.array([s for s in range(1, experts + 1) if math.gcd(s, experts) == 1])
    stride = strides[(token // experts * 7919) % len(strides)]
    return ((token[:, None] + stride[:, None] * np.arange(topk)) % experts).astype(np.int32)


def _random_inputs(geometry: Geometry) -> tuple[Any, ...]:
    """Random normal inputs, at the scale of a model's activations and weights.

    Zeros would take less power and therefore less time.
    """
    import cupy as cp

    spec = geometry.spec
    rng = np.random.default_rng(geometry.rank)

    def filled(shape: tuple[int, ...], scale: float) -> Any:
        out = cp.empty(shape, spec.numpy_dtype)
        normal = scale * rng.standard_normal(min(out.size, _RANDOM_VALUES), np.float32)
        values = cp.asarray(normal.astype(spec.numpy_dtype))
        for begin in range(0, out.nbytes, values.nbytes):  # copies: no kernel has to be loaded
            nbytes = min(values.nbytes, out.nbytes - begin)
            (out.data + begin).copy_from_device_async(values.data, nbytes)
        return out

    ids = balanced_ids(geometry)
    return (
        filled((spec.max_tokens, spec.hidden), 1.0),
        cp.asarray(ids),
        cp.asarray(rng.random(ids.shape, np.float32)),
        filled(geometry.w_up_shape, spec.hidden**-0.5),
        filled(geometry.w_down_shape, geometry.local_intermediate**-0.5),
    )
