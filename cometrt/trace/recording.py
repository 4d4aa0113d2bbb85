"""Tracers: the interface by which executors record events, and its implementations."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any, Protocol

from cometrt.trace.events import Event
from cometrt.trace.timeline import Timeline
from cometrt.world import World


class Tracer(Protocol):
    """Records the steps of a call. The threads of both roles call it."""

    def span(
        self,
        role: str,
        name: str,
        tile: int = -1,
        *,
        local_bytes: int = 0,
        link_bytes: int = 0,
        flag: str = "",
    ) -> contextlib.AbstractContextManager[None]:
        """Record an event from entering until leaving the context; arguments as of `Event`."""
        ...


class NullTracer:
    """A tracer that records nothing."""

    _nothing = contextlib.nullcontext()

    def span(self, *_: object, **__: object) -> contextlib.AbstractContextManager[None]:
        return self._nothing


class Recording:
    """A tracer that collects the events of one rank.

    Attributes:
        events: recorded so far, on this rank.
    """

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
        """Collective: the timeline of all ranks' events, equal on every rank."""
        mine: list[tuple[Any, ...]] = [tuple(event) for event in self.events]
        ranks = self.world.allgather(mine, purpose="timeline")
        return Timeline([Event(*event) for events in ranks for event in events])


class Traceable(Protocol):
    """What `record` needs of a MoELayer."""

    world: World
    tracer: Tracer

    def recorded_by(self, recording: Recording) -> contextlib.AbstractContextManager[None]:
        """Record events of the device's kernels within the context."""
        ...


@contextlib.contextmanager
def record(layer: Traceable) -> Iterator[Recording]:
    """Record the layer's calls on this rank, from entering until leaving the context.

    On "cuda" entering may compile and load kernels, and leaving waits for the calls.

    Raises:
        ValueError: if `layer` is no MoELayer.
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
