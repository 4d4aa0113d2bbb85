"""Events of all ranks, and what they tell."""

from __future__ import annotations

import os

from cometrt.trace import files
from cometrt.trace.events import Event, length, overlap, union
from cometrt.trace.waits import Waits


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
        rank is working, or by that share of its CTAs that is: waits, publishing and planning do
        not count as work. Where roles share cores, as threads of a host do, this shows the order
        of things, not time saved.
        """
        total = hidden = 0.0
        for rank in self.ranks:
            of_rank = [e for e in self.events if e.rank == rank]
            comm = union(e for e in of_rank if e.link_bytes > 0)
            work: dict[int, list[Event]] = {e.cta: [] for e in of_rank}
            for event in of_rank:
                if event.role == "compute" and event.is_work:
                    work[event.cta].append(event)
            total += length(comm)
            hidden += sum(overlap(comm, union(w)) for w in work.values()) / len(work)
        return hidden / total if total else float("nan")

    def waits(self) -> Waits:
        """What each role of each rank waited for, in shares of its time."""
        return Waits(self.events)

    def seconds(self, rank: int, name: str) -> float:
        """Time that one rank spent in events of that name."""
        return sum(e.end_ns - e.begin_ns for e in self._of(rank, name)) * 1e-9

    def link_bytes(self, rank: int, name: str) -> int:
        """Bytes that events of that name moved between one rank and others."""
        return sum(e.link_bytes for e in self._of(rank, name))

    def _of(self, rank: int, name: str) -> list[Event]:
        return [e for e in self.events if e.rank == rank and e.name == name]

    def save_json(self, path: str | os.PathLike[str]) -> None:
        """Chrome trace events: a process a rank, a thread a role (or a thread of a CTA), times
        in us."""
        files.save_json(path, self.events)

    def save_png(
        self, path: str | os.PathLike[str], title: str = "", *, rank: int | None = None
    ) -> None:
        """Two lanes a rank, compute and comm, over time, each divided among the CTAs, if there
        are some; for a `rank`, a lane for each of its CTAs instead.

        Raises:
            ImportError: where matplotlib is not installed.
        """
        files.save_png(path, self.events, title, rank)
