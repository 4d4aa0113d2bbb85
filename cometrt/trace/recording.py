"""What an executor tells while it runs, and who listens."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any, Protocol

from cometrt.trace.events import Event
from cometrt.trace.timeline import Timeline
from cometrt.world import World


class Tracer(Protocol):
    """What an executor tells while it runs; called from both roles' threads."""

    def span(
        self,
        role: str,
        name: str,
        tile: int = -1,
        *,
        local_bytes: int = 0,
        link_bytes: int = 0,
        flag: str = "",
    ) -> contextlib.AbstractContextManager[None]: ...


class NullTracer:
    """Records nothing."""

    _nothing = contextlib.nullcontext()

    def span(self, *_: Any, **__: Any) -> contextlib.AbstractContextManager[None]:
        return self._nothing


class Recording:
    """Events of one rank, in `events`, until `gather` puts all ranks' together."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.events: list[Event] = []

    @contextlib.contextmanager
    def span(
        self,
        role: str,
        name: str,
        tile: int = -1,
        *,
        local_bytes: int = 0,
        link_bytes: int = 0,
        flag: str = "",
    ) -> Iterator[None]:
        begin = time.monotonic_ns()
        try:
            yield
        finally:
            end = time.monotonic_ns()
            rank = self.world.rank
            self.events.append(
                Event(rank, role, name, begin, end, tile, local_bytes, link_bytes, flag)
            )

    def gather(self) -> Timeline:
        """Collective: the timeline of all ranks, the same on each."""
        mine = [tuple(event) for event in self.events]
        ranks = self.world.allgather(mine, purpose="timeline")
        return Timeline([Event(*event) for events in ranks for event in events])


@contextlib.contextmanager
def record(layer: Any) -> Iterator[Recording]:
    """Record the layer's calls on this rank. Only what is inside the ``with`` is kept. On "cuda"
    entering may compile and load kernels, and leaving waits for the calls.

    Raises:
        ValueError: for what is no layer.
    """
    if not hasattr(layer, "tracer"):
        raise ValueError(f"layer must be a cometrt.MoELayer (got {layer!r})")
    recording = Recording(layer.world)
    previous, layer.tracer = layer.tracer, recording
    try:
        with layer.recorded_by(recording):
            yield recording
    finally:
        layer.tracer = previous
