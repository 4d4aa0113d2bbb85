"""Where the time of each role went: work, and what was waited for."""

from __future__ import annotations

import collections

from cometrt.trace.events import ROLES, Event, length, overlap, union


class Waits(dict[tuple[int, str], dict[str, float]]):
    """(rank, role) -> share of its time in "work", and in waits for each flag; print it.

    The time is that from the rank's first event to its last one, of every CTA, or of every thread
    that moves rows. A wait under the same CTA's work cost nothing and is not counted. What is left
    of 1 is getting ready, the gaps between events, and having nothing more to do.
    """

    def __init__(self, events: list[Event]) -> None:
        super().__init__()
        by_rank: dict[int, list[Event]] = collections.defaultdict(list)
        for event in events:
            by_rank[event.rank].append(event)
        for rank, of_rank in sorted(by_rank.items()):
            span = max(e.end_ns for e in of_rank) - min(e.begin_ns for e in of_rank)
            for role in ROLES:
                self[rank, role] = _shares([e for e in of_rank if e.role == role], span)

    def __str__(self) -> str:
        found = {name for shares in self.values() for name in shares}
        names = [name for name in _NAMES if name in found]
        heads = [name.replace("work", "working") for name in names] + ["the rest"]
        lines = ["rank  role     " + "  ".join(f"{head:>14}" for head in heads)]
        for (rank, role), shares in self.items():
            values = [shares.get(name, 0.0) for name in names]
            values.append(1 - sum(values))
            lines.append(f"{rank:4d}  {role:7}  " + "  ".join(f"{value:14.1%}" for value in values))
        return "\n".join(lines)


_NAMES = ("work", "source_ready", "tile_filled", "tile_done", "partials_ready", "link")


def _shares(events: list[Event], span: int) -> dict[str, float]:
    by_worker: dict[tuple[int, int], list[Event]] = collections.defaultdict(list)
    for event in events:
        by_worker[event.worker].append(event)
    times: dict[str, int] = collections.Counter()
    for of_worker in by_worker.values():
        work = union(e for e in of_worker if e.is_work)
        times["work"] += length(work)
        for flag in sorted({e.flag for e in of_worker if e.name == "wait"}):
            waits = union(e for e in of_worker if e.name == "wait" and e.flag == flag)
            times[flag] += length(waits) - overlap(waits, work)
    total = max(span, 1) * max(len(by_worker), 1)
    return {name: time / total for name, time in times.items()}
