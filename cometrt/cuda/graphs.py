"""Replay of calls that come again: a graph is launched faster than a kernel."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Hashable
from typing import Any

from cometrt.world.partitions import auxiliary_stream

_log = logging.getLogger("cometrt")

MAX_GRAPHS = 64  # calls that are remembered
_STREAM = 1  # of auxiliary_stream; nobody queues work there
_capturing = threading.Lock()  # threads may share that stream


class CallGraphs:
    """Cache of one layer's CUDA graphs, keyed by every address and size that the launches depend
    on. A training loop's allocator returns the same addresses: from the second step on, a call is
    one graph launch.

    Attributes:
        enabled: False where every call launches its kernels, to be watched or traced.
        num_made: graphs that have been made so far.
        num_launched: calls so far that had no graph.
    """

    def __init__(self) -> None:
        self._calls: dict[Hashable, _Remembered] = {}
        self._num_calls = 0
        self.enabled = True
        self.num_made = self.num_launched = 0

    def clear(self) -> None:
        """Forget all graphs."""
        self._calls.clear()

    def find(self, key: Hashable, launch: Callable[[int], object]) -> Any:
        """The graph of a call that comes again. None: the caller launches the kernels itself.

        Call it before ranks meet: making a graph may wait for the device. Where capture fails,
        this call and all later ones are launched.

        Args:
            key: all that `launch` depends on.
            launch: queues the call's kernels on a raw stream.
        """
        if not self.enabled:
            self.num_launched += 1
            return None
        self._num_calls += 1
        calls, call = self._calls, self._calls.get(key)  # one look: hashing a key takes long
        if call is None:
            if len(calls) == MAX_GRAPHS:
                del calls[min(calls, key=lambda key: calls[key].last_use)]
            calls[key] = _Remembered(self._num_calls)
            self.num_launched += 1
            return None
        call.last_use = self._num_calls
        if call.graph is None:
            try:
                call.graph = _capture(launch)
                self.num_made += 1
            except Exception as error:  # of the launches: they will raise it again
                _log.warning("calls are launched from now on, not replayed: %s", error)
                self.enabled = False
        return call.graph


class _Remembered:
    """A call that is remembered: its graph once it has come again, and when it came last."""

    def __init__(self, last_use: int) -> None:
        self.graph, self.last_use = None, last_use

    graph: Any


def _capture(launch: Callable[[int], object]) -> Any:
    """On a stream of its own, since others may queue work on the caller's meanwhile."""
    import cupy as cp

    stream = auxiliary_stream(_STREAM)
    with _capturing, stream:
        stream.begin_capture()
        try:
            launch(stream.ptr)
        finally:
            graph = stream.end_capture()
    graph.upload(cp.cuda.get_current_stream())
    return graph
