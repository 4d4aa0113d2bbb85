"""How calls of several ranks are timed: isolated and sustained.

*Isolated*: one call. All ranks wait at a start barrier on the device, idle for a stated time, and
begin together. *Sustained*: calls back to back for seconds, so that the power limit is felt. Both
count the time of the slowest rank by events on its stream.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import random
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

import cometrt
from cometrt.bench.records import spread
from cometrt.bench.workloads import cuda_function

WARM_UP = 3  # calls: launched, captured in a graph, replayed
_STREAM = 2  # number of the auxiliary stream that opens barriers: nobody else's


class Call(NamedTuple):
    """What is timed.

    Attributes:
        run: queues the work; gets what `before` returns.
        before: queues what has to come first and is not timed.
        ended: event that `run` records where the timed part ends; None: at its end.
    """

    run: Callable[[Any], None]
    before: Callable[[], Any] = lambda: None
    ended: Any = None


@dataclasses.dataclass(frozen=True)
class Method:
    """How often and how long.

    Args:
        rounds: isolated calls of each contender. Contenders take turns, in a random order.
        idle_ms: how long GPUs have nothing to do before an isolated call. The host queues the call
            in this time; what it queues later is waited for, and counts.
        sustain_sec: how long sustained calls go on; 0: they are not measured.
    """

    rounds: int = 9
    idle_ms: float = 20.0
    sustain_sec: float = 2.0

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        for field in dataclasses.fields(Method):
            option = f"--{field.name.replace('_', '-')}"
            parser.add_argument(option, type=type(field.default), default=field.default)

    @staticmethod
    def of(args: argparse.Namespace) -> Method:
        return Method(**{f.name: getattr(args, f.name) for f in dataclasses.fields(Method)})


class StartBarrier:
    """Holds streams of all ranks back on their devices, and opens for all of them at once.

    Two flags in rank 0's device memory are used by turns: one is set to zero while all ranks wait
    for the other.
    """

    def __init__(self, world: cometrt.World) -> None:
        """Collective."""
        import cupy as cp

        from cometrt.kernels.compiler import kernels_folder
        from cometrt.world.partitions import auxiliary_stream

        self._cp, self._world, self._round = cp, world, 0
        self._flags = world.allocate(24)[0]  # two, and one that is never set
        self._kernel = cuda_function(
            kernels_folder() / "protocol" / "start_barrier.cu", "start_barrier"
        )
        self._opener = auxiliary_stream(_STREAM) if world.rank == 0 else None
        self._wait(self._flags + 16, 0.0)  # all that is launched later has been launched once
        if self._opener is not None:
            with self._opener as stream:
                self._wait(self._flags + 16, 0.0)
                cp.cuda.runtime.memsetAsync(self._flags, 0, 8, stream.ptr)
                stream.synchronize()
        _synchronize()
        world.barrier()

    def close(self, idle_ms: float) -> None:
        """Collective: what this rank queues next begins when all ranks have been idle for that
        long. No rank may call it before its own earlier work has ended."""
        flag, self._round = self._flag(self._round), self._round + 1
        self._wait(flag, 1e3 * self._world.timeout_sec)
        self._world.barrier()
        if self._opener is None:
            return
        memset = self._cp.cuda.runtime.memsetAsync
        with self._opener as stream:
            memset(self._flag(self._round), 0, 8, stream.ptr)
            self._wait(self._flags + 16, idle_ms)
            memset(flag, 1, 8, stream.ptr)

    def _flag(self, number: int) -> int:
        return self._flags + 8 * (number % 2)

    def _wait(self, flag: int, ms: float) -> None:
        """On the current stream, until the flag is set or the time is over."""
        self._kernel((1,), (1,), (np.uint64(flag), np.uint64(1e6 * ms)))


def measure(
    world: cometrt.World, barrier: StartBarrier, calls: dict[str, Call], method: Method
) -> dict[str, dict[str, Any]]:
    """Collective: time each call. All ranks return the times of the slowest rank.

    Returns:
        By name: {"isolated": spread of milliseconds, "sustained": milliseconds a call}.
    """
    for call in calls.values():
        for _ in range(WARM_UP):
            call.run(call.before())
            _synchronize()
        world.barrier()
    isolated: dict[str, list[float]] = {name: [] for name in calls}
    for index in range(method.rounds):
        # The power budget remembers what ran before: no call always follows the same one.
        for name in random.Random(index).sample(list(calls), len(calls)):
            isolated[name].append(_isolated(barrier, calls[name], method.idle_ms))
    found: dict[str, dict[str, Any]] = {}
    for name, times in slowest(world.allgather(isolated)).items():
        found[name] = {"isolated": spread(times)}
        if method.sustain_sec and calls[name].ended is None:
            count = max(3, math.ceil(1e3 * method.sustain_sec / statistics.median(times)))
            mean = _sustained(barrier, calls[name], count, method.idle_ms)
            found[name]["sustained"] = max(world.allgather(mean))
    return found


def slowest(ranks: list[dict[str, list[float]]]) -> dict[str, list[float]]:
    """[rounds] by name, of the rank that took longest in each round."""
    return {
        name: [max(times) for times in zip(*(rank[name] for rank in ranks), strict=True)]
        for name in ranks[0]
    }


def _isolated(barrier: StartBarrier, call: Call, idle_ms: float) -> float:
    given = call.before()
    _synchronize()
    barrier.close(idle_ms)
    begin, end = _events()
    begin.record()
    call.run(given)
    end.record()
    del given
    end.synchronize()
    return _elapsed_ms(begin, call.ended or end)


def _sustained(barrier: StartBarrier, call: Call, count: int, idle_ms: float) -> float:
    """Mean time; of calls with something before them, that of the timed parts alone."""
    _synchronize()
    barrier.close(idle_ms)
    pairs = [_events()]
    if call.before is _NOTHING:
        begin, end = pairs[0]
        begin.record()
        for _ in range(count):
            call.run(None)
        end.record()
    else:
        pairs = [_events() for _ in range(count)]
        for begin, end in pairs:
            given = call.before()
            begin.record()
            call.run(given)
            end.record()
    end.synchronize()
    return sum(_elapsed_ms(*pair) for pair in pairs) / count


_NOTHING = Call._field_defaults["before"]


def _events() -> tuple[Any, Any]:
    import cupy as cp

    return cp.cuda.Event(), cp.cuda.Event()


def _elapsed_ms(begin: Any, end: Any) -> float:
    import cupy as cp

    return float(cp.cuda.get_elapsed_time(begin, end))


def _synchronize() -> None:
    import cupy as cp

    cp.cuda.get_current_stream().synchronize()
