"""Calls that come again, replayed: one launch of a graph costs the host less than one kernel's."""

from __future__ import annotations

import collections
from collections.abc import Callable, Hashable
from typing import Any

from cometrt.world.partitions import side_stream

_MOST = 64  # calls that are remembered
_UNCAPTURABLE = (0, 1)  # the default stream by its two handles


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
        """The graph of a call that has been here before, or None.

        To be called before ranks meet: making a graph may wait for the device.

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
        graph = graphs[key]
        if graph is None:
            graph = graphs[key] = _capture(launch)
        return graph

    def clear(self) -> None:
        self._graphs.clear()


def _capture(launch: Callable[[], None]) -> Any:
    import cupy as cp

    stream = cp.cuda.get_current_stream()
    if stream.ptr in _UNCAPTURABLE:
        stream = side_stream()
    with stream:
        stream.begin_capture()
        try:
            launch()
        finally:
            graph = stream.end_capture()
        graph.upload(stream)
    return graph
