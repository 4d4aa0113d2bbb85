"""Trials of the tuner: the time of a fused forward or backward with a given config, on the slowest
rank."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from cometrt.cuda.engine import current_stream
from cometrt.errors import CallNotBegun
from cometrt.kernels.launch import load_kernels
from cometrt.plan import TileConfig
from cometrt.plan.config import RAIL_FIELDS
from cometrt.residuals import Residuals
from cometrt.specs import Geometry, Gradients
from cometrt.trace import NullTracer
from cometrt.world import World

_LONG_MS, _VERY_LONG_MS = 10.0, 50.0  # calls that vary less, by their time
_RANDOM_VALUES = 1 << 22


class Trials:
    """Times calls of one layer with any config, all ranks together.

    Configs that differ in launches alone share an executor.

    Args:
        make: collective: makes an executor of the layer in mode "fused" with a config.
        inputs: forward's five arrays, checked; None: random ones of max_tokens tokens a rank, with
            the same number of rows for every expert.
        training: whether forwards keep residuals, and backwards may be timed.
        room: the config that needs the most memory of those to come.

    Attributes:
        elapsed_sec: since they were made, equal on all ranks.
        longest_sec: that any one `time` has taken, equal on all ranks.
    """

    def __init__(
        self,
        world: World,
        geometry: Geometry,
        make: Callable[[TileConfig], Any],
        inputs: tuple[Any, ...] | None,
        training: bool,
        room: TileConfig,
    ) -> None:
        import cupy as cp

        self._begin = time.monotonic()
        self.elapsed_sec = self.longest_sec = 0.0
        self._world, self._geometry, self._make = world, geometry, make
        self._training, self._room, self._tracer = training, room, NullTracer()
        self._inputs = _random_inputs(geometry, world.nodes) if inputs is None else inputs
        self._y = cp.empty_like(self._inputs[0])
        if training:
            spec, (x, _, weights, w_up, w_down) = geometry.spec, self._inputs
            self._dy = _normal(x.shape, 1.0, spec.numpy_dtype, np.random.default_rng(1))
            self._grads = Gradients(*map(cp.empty_like, (x, weights, w_up, w_down)))
        self._events = cp.cuda.Event(), cp.cuda.Event()
        self._barrier = StartBarrier(world.timeout_sec)
        self._executors: list[Any] = []
        self._rail: list[int | None] = []  # RAIL_FIELDS of the executors
        self._counts: dict[str, tuple[int, int]] = {}  # rounds and calls, by pass

    def executor(self, config: TileConfig) -> Any:
        """A new executor with this config. Collective."""
        return self._make(config)

    def close(self) -> None:
        """Give up what trials hold, once their calls have ended."""
        for executor in self._executors:
            executor.give_up()
        self._executors.clear()

    def time(self, config: TileConfig, which: str, counts: tuple[int, int] | None = None) -> float:
        """Milliseconds of a forward or a backward: median of rounds, the same on all ranks.
        Collective.

        Args:
            counts: rounds, and calls in a row that a round times; None: by the time of a call.

        Raises:
            RoutingError, CapacityError: for given inputs, on all ranks.
        """
        try:
            # All ranks have met in the last trial's allgather, and meet again before this one's
            # first launch: no kernel waits for a peer while memory is allocated.
            executor = self._executor_for(config)
            begin = self.elapsed_sec
            if counts is None:
                if which not in self._counts:
                    self._counts[which] = counts_for(self._time(executor, which, 1, 1))
                counts = self._counts[which]
            ms = self._time(executor, which, *counts)
            self.longest_sec = max(self.longest_sec, self.elapsed_sec - begin)
            return ms
        except BaseException:
            for executor in self._executors:
                executor.retire()  # its kernels may run on
            raise

    def _executor_for(self, config: TileConfig) -> Any:
        rail = [getattr(config, name) for name in RAIL_FIELDS]
        if rail != self._rail:  # each has memory for the tokens of all nodes
            self.close()
            self._rail = rail
        for executor in self._executors:
            if executor.reschedule(config):
                return executor
        room = dataclasses.replace(
            config,
            order=self._room.order,
            n_chunk=self._room.n_chunk,
            backward_order=None,
            backward_n_chunk=None,
        )
        executor = self.executor(room)
        if not executor.reschedule(config):
            executor.give_up()
            executor = self.executor(config)
        executor.graphs.enabled = False  # nothing may be captured behind the barrier
        self._executors.append(executor)
        # What is wrong with given inputs is raised on all ranks here: over several nodes no other
        # call may be queued behind it, since transfers of ranks that queue less would be missing.
        with _raising_reasons():
            self._forward(executor)
        executor.synchronize()
        return executor

    def _forward(self, executor: Any) -> Any:
        return executor.forward(
            *self._inputs, training=self._training, out=self._y, tracer=self._tracer
        )

    def _time(self, executor: Any, which: str, rounds: int, calls: int) -> float:
        import cupy as cp

        world, (begin, end) = self._world, self._events
        call = self._call_of(executor, which)
        self.calls(call, calls)  # from here on all memory that calls take is there
        executor.synchronize()
        world.barrier()
        times = []
        for _ in range(rounds):
            # The device begins when the host has queued all calls: the host may be slower, and
            # ranks that share a GPU meet on the host in each call. Ranks do not leave the barrier
            # at the same time, but end the first call together; it is not timed.
            self._barrier.close()
            try:
                self.calls(call, calls)
                world.barrier()
            finally:
                self._barrier.open()
            end.synchronize()
            times.append(cp.cuda.get_elapsed_time(begin, end) / calls)
        executor.synchronize()
        ranks = world.allgather((times, time.monotonic() - self._begin), purpose="tune")
        self.elapsed_sec = max(elapsed for _, elapsed in ranks)
        slowest = [max(times) for times in zip(*(times for times, _ in ranks), strict=True)]
        return statistics.median(slowest)

    def _call_of(self, executor: Any, which: str) -> Callable[[], object]:
        """What is timed: forwards, or backwards of one and the same forward."""
        if which == "forward":
            return lambda: self._forward(executor)
        with _raising_reasons():
            kept = self._forward(executor)
        _, _, _, w_up, w_down = self._inputs
        saved = Residuals(serial=0, num_tokens=len(self._y), w_up=w_up, w_down=w_down, **kept)

        def backward() -> None:
            executor.backward(
                self._dy, saved, out=self._grads, accumulate=False, tracer=self._tracer
            )

        return backward

    def calls(self, call: Callable[[], object], count: int) -> None:
        """Queue one call, then `count` calls between the two events. Results are dropped."""
        begin, end = self._events
        with _raising_reasons():
            for index in range(1 + count):
                if index == 1:
                    begin.record()
                call()
        end.record()


@contextlib.contextmanager
def _raising_reasons() -> Iterator[None]:
    try:
        yield
    except CallNotBegun as error:
        raise error.reason from None


def counts_for(ms: float) -> tuple[int, int]:
    """Rounds, and calls in a row that a round times, of calls that take so long."""
    if ms < _LONG_MS:
        return 5, 3
    return (5, 1) if ms < _VERY_LONG_MS else (3, 1)


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


def balanced_ids(geometry: Geometry, nodes: int = 1) -> np.ndarray:
    """[max_tokens, K] int32: distinct experts for each of this rank's tokens.

    Over all ranks, every expert is chosen equally often, to within K; nearly so where only wanted
    tokens cross. At most `rail_tokens` tokens of a rank want experts of any one other node.
    """
    spec, rank = geometry.spec, geometry.rank
    tokens, of_node = np.arange(spec.max_tokens, dtype=np.int64), spec.num_experts // nodes
    # A token chooses among the experts of `wide` nodes, from `first` on.
    first, number = np.zeros_like(tokens), rank * spec.max_tokens + tokens
    wide = min(nodes, spec.crossing_tokens // -(-spec.max_tokens // nodes))
    if 0 < wide < nodes:
        first, number = tokens % nodes, number // nodes
    elif wide == 0:  # as many as may go to each other node, the rest stays at home
        wide, home = 1, rank * nodes // geometry.size
        away = tokens < (nodes - 1) * spec.crossing_tokens
        first = (home + away * (1 + tokens % max(1, nodes - 1))) % nodes
    # As many consecutive numbers as there are experts begin at different ones. All take the same
    # stride through the experts, which is coprime to their number.
    experts = wide * of_node
    strides = np.array([s for s in range(1, experts + 1) if math.gcd(s, experts) == 1])
    stride = strides[(number // experts * 7919) % len(strides)]
    chosen = (number[:, None] + stride[:, None] * np.arange(spec.topk)) % experts
    return ((first[:, None] * of_node + chosen) % spec.num_experts).astype(np.int32)


def _random_inputs(geometry: Geometry, nodes: int) -> tuple[Any, ...]:
    """Random normal inputs, at the scale of a model's activations and weights.

    Zeros would take less power and therefore less time.
    """
    import cupy as cp

    spec, rng = geometry.spec, np.random.default_rng(geometry.rank)
    ids, dtype = balanced_ids(geometry, nodes), spec.numpy_dtype
    return (
        _normal((spec.max_tokens, spec.hidden), 1.0, dtype, rng),
        cp.asarray(ids),
        cp.asarray(rng.random(ids.shape, np.float32)),
        _normal(geometry.w_up_shape, spec.hidden**-0.5, dtype, rng),
        _normal(geometry.w_down_shape, geometry.local_intermediate**-0.5, dtype, rng),
    )


def _normal(shape: tuple[int, ...], scale: float, dtype: np.dtype, rng: np.random.Generator) -> Any:
    import cupy as cp

    out = cp.empty(shape, dtype)
    normal = scale * rng.standard_normal(min(out.size, _RANDOM_VALUES), np.float32)
    values = cp.asarray(normal.astype(dtype))
    for begin in range(0, out.nbytes, max(1, values.nbytes)):  # copies: no kernel has to be loaded
        nbytes = min(values.nbytes, out.nbytes - begin)
        (out.data + begin).copy_from_device_async(values.data, nbytes)
    return out
