"""The passes of a timeline: which events belong to which forward or backward."""

from __future__ import annotations

import dataclasses
import functools

from cometrt.trace.events import Event

FORWARD = ("up", "down")  # GEMMs, in the order of a pass
BACKWARD = ("down dgrad", "up dgrad", "wgrad")
# With these a pass begins; a pass ends with what it reduces, and with the waits for that.
_BEGINS = ("publish", "plan", "pull")
_FLAGS_OF_BEGIN = ("source_ready", "tile_filled")


@dataclasses.dataclass
class Pass:
    """A forward or a backward: its events, sorted by their begins.

    Attributes:
        name: "forward" or "backward".
        number: of the pass, from 0, counted on each rank.
        events: of all ranks.
    """

    name: str
    number: int
    events: list[Event]

    @functools.cached_property
    def begin_ns(self) -> int:
        return min(event.begin_ns for event in self.events)

    @functools.cached_property
    def end_ns(self) -> int:
        return max(event.end_ns for event in self.events)

    def of_rank(self, rank: int) -> list[Event]:
        return [event for event in self.events if event.rank == rank]


def passes_of(events: list[Event]) -> list[Pass]:
    """The passes, in their order. The calls of a rank follow each other, so a pass is a stretch
    of the rank's time in which all GEMMs are of one direction, and are not begun again.

    Args:
        events: sorted by their begins. Those of a rank without GEMMs belong to one pass.
    """
    found: dict[int, Pass] = {}
    for rank in sorted({event.rank for event in events}):
        of_rank = [event for event in events if event.rank == rank]
        for number, (name, part) in enumerate(_split(of_rank)):
            found.setdefault(number, Pass(name, number, [])).events.extend(part)
    for one in found.values():
        one.events.sort(key=lambda event: event.begin_ns)
    return [found[number] for number in sorted(found)]


def _split(events: list[Event]) -> list[tuple[str, list[Event]]]:
    """Of one rank, the name and the events of each pass."""
    gemms = [event for event in events if event.name in FORWARD + BACKWARD]
    borders: list[int] = []  # begins of all passes but the first
    names = ["backward" if gemms and gemms[0].name in BACKWARD else "forward"]
    stage, ended = _stage(gemms[0]) if gemms else 0, 0
    for event in gemms:
        direction = "backward" if event.name in BACKWARD else "forward"
        if direction != names[-1] or (_stage(event) < stage and event.begin_ns >= ended):
            borders.append(_border(events, ended, event.begin_ns))
            names.append(direction)
            stage = _stage(event)
        stage, ended = max(stage, _stage(event)), max(ended, event.end_ns)
    parts: list[list[Event]] = [[] for _ in names]
    index = 0
    for event in events:
        while index < len(borders) and event.begin_ns >= borders[index]:
            index += 1
        parts[index].append(event)
    return list(zip(names, parts, strict=True))


def _stage(event: Event) -> int:
    return (BACKWARD if event.name in BACKWARD else FORWARD).index(event.name)


def _border(events: list[Event], ended: int, begins: int) -> int:
    """When a pass begins, between the last GEMM of the one before and its own first."""
    for event in events:
        if ended <= event.begin_ns < begins and (
            event.name in _BEGINS or event.flag in _FLAGS_OF_BEGIN
        ):
            return event.begin_ns
    return begins
