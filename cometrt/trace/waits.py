"""`Waits`: the fractions of each role's time in work and in waits."""

from __future__ import annotations

import collections

from cometrt.trace.events import ROLES, Event, length, of_workers, overlap, union


class Waits(dict[tuple[int, str], dict[str, float]]):
    """(rank, role) -> {"work" or the flag of a wait: fraction of the role's time}. Printable.

    The role's time is the span from the rank's first event to its last, once for each CTA or
    transfer thread. A wait that overlaps work of the same CTA costs nothing and does not count.
    The rest up to 1 is preparation, gaps between events, and idle time at the end.
    """

    NAMES = ("work", "source_ready", "tile_filled", "tile_done", "partials_ready", "link")

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
        names = [name for name in self.NAMES if name in found]
        heads = [name.replace("work", "working") for name in names] + ["the rest"]
        lines = ["rank  role     " + "  ".join(f"{head:>14}" for head in heads)]
        for (rank, role), shares in self.items():
            values = [shares.get(name, 0.0) for name in names]
            values.append(1 - sum(values))
            lines.append(f"{rank:4d}  {role:7}  " + "  ".join(f"{value:14.1%}" for value in values))
        return "\n".join(lines)


def _shares(events: list[Event], span: int) -> dict[str, float]:
    by_worker: dict[tuple[int, int], list[Event]] = collections.defaultdict(list)
    for event in of_workers(events):
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
