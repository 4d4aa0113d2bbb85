"""Calls that come again, replayed: one launch of a graph costs the host less than one kernel's."""

from __future__ import annotations

import collections
import logging
import threading
from collections.abc import Callable, Hashable
from typing import Any

from cometrt.world.partitions import auxiliary_stream

_log = logging.getLogger("cometrt")

_MOST = 64  # calls that are remembered
_STREAM = 1  # of auxiliary_stream: work is never queued there, not by anyone
_capturing = threading.Lock()  # threads may share that stream


class CallGraphs:
    """One layer's calls by what their kernels are launched with: who allocates and frees in turns
    finds the same memory again, so that in a loop all calls come again sooner or later.

    Attributes:
        enabled: False where every call has to launch its kernels, to be watched or traced.
    """

    def __init__(self) -> None:
        self._graphs: collections.OrderedDict[Hashable, Any] = collections.OrderedDict()
        self.enabled = True

    def find(self, key: Hashable, launch: Callable[[], None]) -> Any:
        """The graph of a call that has been here before, or None: then it is to be launched.

        To be called before ranks meet: making a graph may wait for the device. A call that cannot
        be captured is launched, and so are all later ones.

        Args:
            key: all that `launch` depends on.
            launch: queues the call's kernels on the current stream.
        """
        if not self.enabled:
            return None
        graphs = self._graphs
        if key not in graphs:
            graphs[key] = None
            if len(graphs) > _MOST:
                graphs.popitem(last=False)
            return None
        graphs.move_to_end(key)
        if graphs[key] is None:
            try:
                graphs[key] = _capture(launch)
            except Exception as error:  # of the launches: they will raise it again
                _log.warning("calls are launched from now on, not replayed: %s", error)
                self.enabled = False
        return graphs[key]


def _capture(launch: Callable[[], None]) -> Any:
    """On a stream of its own: what others queue on the caller's meanwhile is not the call's."""
    import cupy as cp

    stream = auxiliary_stream(_STREAM)
    with _capturing, stream:
        stream.begin_capture()
        try:
            launch()
        finally:
            graph = stream.end_capture()
    graph.upload(cp.cuda.get_current_stream())
    return graph
