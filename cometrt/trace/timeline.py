"""`Timeline`: the events of all ranks, and figures computed from them."""

from __future__ import annotations

import functools
import os

from cometrt.trace import perfetto, picture
from cometrt.trace.events import Event, length, of_workers, overlap, union
from cometrt.trace.passes import Pass, passes_of
from cometrt.trace.waits import Waits


class Timeline:
    """The events of all ranks, sorted by their begins."""

    def __init__(self, events: list[Event]) -> None:
        self.events = sorted(events, key=lambda event: event.begin_ns)

    @property
    def ranks(self) -> list[int]:
        return sorted({event.rank for event in self.events})

    @functools.cached_property
    def passes(self) -> list[Pass]:
        """The forwards and backwards, in their order."""
        return passes_of(self.events)

    @property
    def span_sec(self) -> float:
        """Seconds from the begin of the first event to the end of the last."""
        if not self.events:
            return 0.0
        return (max(e.end_ns for e in self.events) - self.events[0].begin_ns) * 1e-9

    @property
    def hidden_share(self) -> float:
        """Fraction of the communication time that overlaps compute, in [0, 1]. NaN: none was sent.

        Communication is the time of events that move bytes between ranks: "pull", and "reduce and
        push" of rows with another home. It is hidden while the compute role of the same rank
        works; with CTAs, by the fraction of them that works. Waits, publishing and planning are
        no work. On "host" both roles share the cores, so this is no measure of time saved.
        """
        total = hidden = 0.0
        for rank in self.ranks:
            of_rank = of_workers(e for e in self.events if e.rank == rank)
            comm = union(e for e in of_rank if e.link_bytes > 0)
            work: dict[int, list[Event]] = {e.cta: [] for e in of_rank}
            for event in of_rank:
                if event.role == "compute" and event.is_work:
                    work[event.cta].append(event)
            total += length(comm)
            hidden += sum(overlap(comm, union(w)) for w in work.values()) / len(work)
        return hidden / total if total else float("nan")

    def waits(self) -> Waits:
        """For each role of each rank: the fractions of its time in work and in waits."""
        return Waits(self.events)

    def seconds(self, rank: int, name: str) -> float:
        """Seconds that one rank spent in events of that name."""
        return sum(e.end_ns - e.begin_ns for e in self._of(rank, name)) * 1e-9

    def link_bytes(self, rank: int, name: str) -> int:
        """Bytes that events of that name moved between one rank and the others."""
        return sum(e.link_bytes for e in self._of(rank, name))

    def _of(self, rank: int, name: str) -> list[Event]:
        return [e for e in self.events if e.rank == rank and e.name == name]

    def save_json(self, path: str | os.PathLike[str]) -> None:
        """Write Chrome trace events, for Perfetto or chrome://tracing.

        A rank is a process. A role is a thread; with CTAs, each recording thread is one.
        """
        perfetto.save_json(path, {"": self.events})

    def save_png(
        self, path: str | os.PathLike[str], title: str = "", *, rank: int | None = None
    ) -> None:
        """Draw the timeline as a PNG, with the hidden share in its title.

        Args:
            path: of the file.
            title: of the picture.
            rank: None: two lanes a rank, compute and comm; with CTAs, the height of a color is the
                share of them that do it. Else one lane for each CTA of that rank.

        Raises:
            ImportError: if matplotlib is not installed.
        """
        title += hidden(": " if title else "", self.hidden_share, " of the communication hidden")
        picture.save_png(path, [picture.Section("", self.passes, self.notes)], title, rank)

    @property
    def notes(self) -> list[str]:
        """Of each pass: its time and its hidden share."""
        notes = []
        for one in self.passes:
            share = Timeline(one.events).hidden_share
            time = milliseconds(one.end_ns - one.begin_ns)
            notes.append(f"{one.name} {time}{hidden(', ', share, ' hidden')}")
        return notes


def milliseconds(ns: float) -> str:
    ms = ns / 1e6
    return f"{ms:.{0 if ms >= 100 else 2}f} ms"


def hidden(before: str, share: float, after: str) -> str:
    """ "": the share is NaN."""
    return "" if share != share else f"{before}{share:.0%}{after}"
