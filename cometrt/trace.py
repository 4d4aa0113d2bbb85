"""Record what both roles of a layer do, draw it, and say how much communication was hidden.

with cometrt.trace.record(layer) as recording:
    layer.forward(...)
timeline = recording.gather()               # collective: all ranks' events
timeline.save_png("timeline.png")           # needs matplotlib
timeline.save_json("timeline.json")         # opens in Perfetto and chrome://tracing
print(timeline.hidden_share)
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

from cometrt.world import World

ROLES = ("comm", "compute")
_COLORS = {
    "pull": "#4c9be8",
    "reduce and push": "#e8944c",
    "reduce at home": "#c95f8a",
    "up": "#3c8d5a",
    "down": "#8bc34a",
    "down dgrad": "#00897b",
    "up dgrad": "#80cbc4",
    "wgrad": "#33691e",
    "publish": "#7d6fb3",
    "plan": "#b3a6d9",
    "wait": "#e4e4e4",
}


class Event(NamedTuple):
    """One stretch of one role. Times in ns on a clock that all ranks of a host share.

    Names: "publish", "plan", "wait"; comm "pull", "reduce and push", "reduce at home"; compute
    "up", "down" in forward, "down dgrad", "up dgrad", "wgrad" in backward.

    `tile` is an M-tile, a block of tokens or an expert, -1 where none applies; `local_bytes`
    and `link_bytes` are the bytes moved within the rank and between ranks.
    """

    rank: int
    role: str
    name: str
    begin_ns: int
    end_ns: int
    tile: int = -1
    local_bytes: int = 0
    link_bytes: int = 0


class Tracer(Protocol):
    """What an executor tells while it runs; called from both roles' threads."""

    def span(
        self, role: str, name: str, tile: int = -1, *, local_bytes: int = 0, link_bytes: int = 0
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
        self, role: str, name: str, tile: int = -1, *, local_bytes: int = 0, link_bytes: int = 0
    ) -> Iterator[None]:
        begin = time.monotonic_ns()
        try:
            yield
        finally:
            end = time.monotonic_ns()
            self.events.append(
                Event(self.world.rank, role, name, begin, end, tile, local_bytes, link_bytes)
            )

    def gather(self) -> Timeline:
        """Collective: the timeline of all ranks, the same on each."""
        mine = [tuple(event) for event in self.events]
        ranks = self.world.allgather(mine, purpose="timeline")
        return Timeline([Event(*event) for events in ranks for event in events])


@contextlib.contextmanager
def record(layer: Any) -> Iterator[Recording]:
    """Record the layer's calls on this rank. Only what is inside the ``with`` is kept.

    Raises:
        ValueError: for what is no layer.
    """
    if not hasattr(layer, "tracer"):
        raise ValueError(f"layer must be a cometrt.MoELayer (got {layer!r})")
    recording = Recording(layer.world)
    previous, layer.tracer = layer.tracer, recording
    try:
        yield recording
    finally:
        layer.tracer = previous


class Timeline:
    """Events of all ranks."""

    def __init__(self, events: list[Event]) -> None:
        self.events = sorted(events, key=lambda event: event.begin_ns)

    @property
    def ranks(self) -> list[int]:
        return sorted({event.rank for event in self.events})

    @property
    def span_sec(self) -> float:
        """From the first event's begin to the last one's end."""
        if not self.events:
            return 0.0
        return (max(e.end_ns for e in self.events) - self.events[0].begin_ns) * 1e-9

    @property
    def hidden_share(self) -> float:
        """Share of the communication that ran under compute, in [0, 1]; NaN without any.

        Communication is the time of events that move bytes between ranks ("pull" and "reduce
        and push" of rows with another home). It is hidden while the compute role of the same
        rank is working: waits, publishing and planning do not count as work. Where roles share
        cores, as threads of a host do, this shows the order of things, not time saved.
        """
        total = hidden = 0
        for rank in self.ranks:
            comm = _union(e for e in self.events if e.rank == rank and e.link_bytes > 0)
            compute = _union(
                e
                for e in self.events
                if e.rank == rank and e.role == "compute" and e.name not in _NO_WORK
            )
            total += sum(end - begin for begin, end in comm)
            hidden += _overlap(comm, compute)
        return hidden / total if total else float("nan")

    def seconds(self, rank: int, name: str) -> float:
        """Time that one rank spent in events of that name."""
        return sum(e.end_ns - e.begin_ns for e in self._of(rank, name)) * 1e-9

    def link_bytes(self, rank: int, name: str) -> int:
        """Bytes that events of that name moved between one rank and others."""
        return sum(e.link_bytes for e in self._of(rank, name))

    def _of(self, rank: int, name: str) -> list[Event]:
        return [e for e in self.events if e.rank == rank and e.name == name]

    def save_json(self, path: str | os.PathLike[str]) -> None:
        """Chrome trace events: a process a rank, a thread a role, times in us."""
        start = self.events[0].begin_ns if self.events else 0
        records: list[dict[str, Any]] = []
        for rank in self.ranks:
            records.append(_metadata("process_name", rank, 0, f"rank {rank}"))
            for lane, role in enumerate(ROLES):
                records.append(_metadata("thread_name", rank, lane, role))
        for event in self.events:
            arguments = {
                "tile": event.tile,
                "local_bytes": event.local_bytes,
                "link_bytes": event.link_bytes,
            }
            records.append(
                {
                    "name": event.name,
                    "cat": event.role,
                    "ph": "X",
                    "ts": (event.begin_ns - start) / 1e3,
                    "dur": (event.end_ns - event.begin_ns) / 1e3,
                    "pid": event.rank,
                    "tid": ROLES.index(event.role),
                    "args": arguments,
                }
            )
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"traceEvents": records, "displayTimeUnit": "ms"}, file)

    def save_png(self, path: str | os.PathLike[str], title: str = "") -> None:
        """Two lanes a rank, compute and comm, over time.

        Raises:
            ImportError: where matplotlib is not installed.
        """
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
            from matplotlib.patches import Patch
        except ImportError as error:
            raise ImportError("save_png needs matplotlib: pip install 'cometrt[plot]'") from error

        figure = Figure(figsize=(13, 1.6 + 0.75 * len(self.ranks)), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        start = self.events[0].begin_ns if self.events else 0
        ticks, labels = [], []
        for row, rank in enumerate(self.ranks):
            for role, offset in (("compute", 0.0), ("comm", 0.42)):
                events = [e for e in self.events if e.rank == rank and e.role == role]
                bars = [((e.begin_ns - start) / 1e6, (e.end_ns - e.begin_ns) / 1e6) for e in events]
                colors = [_COLORS.get(e.name, "#999999") for e in events]
                axes.broken_barh(bars, (row + offset, 0.38), facecolors=colors)
                ticks.append(row + offset + 0.19)
                labels.append(f"rank {rank} {role}")
        axes.set_yticks(ticks, labels)
        axes.invert_yaxis()
        axes.set_xlabel("ms")
        axes.set_xlim(left=0)
        axes.set_title(title, loc="left")
        names = [name for name in _COLORS if any(e.name == name for e in self.events)]
        figure.legend(
            handles=[Patch(color=_COLORS[name], label=name) for name in names],
            loc="outside lower center",
            ncols=min(max(len(names), 1), 6),
            frameon=False,
        )
        figure.savefig(path, dpi=120, format="png")


_NO_WORK = ("wait", "publish", "plan")


def _metadata(name: str, rank: int, lane: int, label: str) -> dict[str, Any]:
    return {"name": name, "ph": "M", "pid": rank, "tid": lane, "args": {"name": label}}


def _union(events: Iterator[Event]) -> list[tuple[int, int]]:
    """Disjoint stretches that the events cover, in order."""
    merged: list[tuple[int, int]] = []
    for begin, end in sorted((e.begin_ns, e.end_ns) for e in events):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((begin, end))
    return merged


def _overlap(left: list[tuple[int, int]], right: list[tuple[int, int]]) -> int:
    """Length of the intersection of two lists of disjoint stretches."""
    total = i = j = 0
    while i < len(left) and j < len(right):
        total += max(0, min(left[i][1], right[j][1]) - max(left[i][0], right[j][0]))
        if left[i][1] < right[j][1]:
            i += 1
        else:
            j += 1
    return total
