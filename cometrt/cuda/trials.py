"""How long a fused forward takes with a config, by the slowest rank."""

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

_ROUNDS, _CALLS = 5, 3  # a round times so many calls in a row
_RANDOM_VALUES = 1 << 22


class Trials:
    """Forwards of one layer's shape with any config, all ranks together.

    Args:
        layer: its number, which candidates have too.
        inputs: forward's five arrays, checked; None: random ones of max_tokens tokens a rank, as
            many rows for every expert.
        training: whether forwards keep what backward needs.
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
        self._gate = Gate(world.timeout_sec)

    def executor(self, config: TileConfig) -> CudaExecutor:
        """Collective."""
        shape = PlanShape(self._geometry, config)
        return CudaExecutor(self._world, shape, self._layer, "fused")

    def time(self, config: TileConfig) -> float:
        """Collective: milliseconds of a forward, median of rounds, equal on all ranks.

        Raises:
            RoutingError, CapacityError: of given inputs, on all ranks.
        """
        # All ranks have met in the last trial's allgather, and meet again before this one's first
        # launch: no kernel waits for a peer while memory is allocated.
        executor = self.executor(config)
        executor.graphs.enabled = False  # none is to be made behind the gate
        try:
            return self._time(executor)
        except BaseException:
            executor.retire()  # its kernels may run on
            raise

    def _time(self, executor: CudaExecutor) -> float:
        import cupy as cp

        world, (begin, end) = self._world, self._events
        self.calls(executor)  # from here on all memory that calls take is there
        executor.synchronize()
        world.barrier()
        times = []
        for _ in range(_ROUNDS):
            # The host may be slower than the device, and ranks that share a GPU meet on the host in
            # each call: so the device begins when all is queued. Ranks do not leave their gates at
            # once, but end the first call together: it is not timed.
            self._gate.close()
            try:
                self.calls(executor)
                world.barrier()
            finally:
                self._gate.open()
            end.synchronize()
            times.append(cp.cuda.get_elapsed_time(begin, end) / _CALLS)
        executor.synchronize()
        ranks = world.allgather(times, purpose="tune")
        return statistics.median(max(times) for times in zip(*ranks, strict=True))

    def calls(self, executor: CudaExecutor) -> None:
        """One call, and _CALLS between the events; nothing of them is kept."""
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


class Gate:
    """What is queued behind `close` begins after `open`, or when timeout_sec have passed."""

    def __init__(self, timeout_sec: float) -> None:
        import cupy as cp

        self._memory = cp.cuda.alloc_pinned_memory(8)
        self._flag = np.frombuffer(self._memory, np.uint64, 1)
        self._timeout_ns = np.uint64(timeout_sec * 1e9)
        (self._kernel,) = load_kernels("protocol/start_barrier.cu", "start_barrier")

    def close(self) -> None:
        """What was queued behind the last one must have ended."""
        self._flag[0] = 0
        address = np.uint64(self._memory.ptr)
        self._kernel(current_stream(), 1, address, self._timeout_ns)

    def open(self) -> None:
        self._flag[0] = 1


def balanced_ids(geometry: Geometry) -> np.ndarray:
    """[max_tokens, K] int32: distinct experts of each of this rank's tokens, over all ranks each
    expert as often as any other, to within K."""
    spec = geometry.spec
    experts, topk = spec.num_experts, spec.topk
    token = geometry.rank * spec.max_tokens + np.arange(spec.max_tokens, dtype=np.int64)
    # E tokens in a row begin at E different experts and take the same stride through them, which
    # has no divisor in common with E.
    strides = np.array([s for s in range(1, experts + 1) if math.gcd(s, experts) == 1])
    stride = strides[(token // experts * 7919) % len(strides)]
    return ((token[:, None] + stride[:, None] * np.arange(topk)) % experts).astype(np.int32)


def _random_inputs(geometry: Geometry) -> tuple[Any, ...]:
    """Normal values of the scale that activations and weights have: multiplying zeros takes less
    power, and so less time."""
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
