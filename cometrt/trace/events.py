"""Events of a timeline, and arithmetic with the time intervals that they cover."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

ROLES = ("comm", "compute")
_NO_WORK = ("wait", "publish", "plan")


class Event(NamedTuple):
    """One step of one role on one rank.

    Attributes:
        rank: the number of the rank.
        role: "comm" or "compute".
        name: "publish", "plan" or "wait"; of comm "pull", "reduce and push", "reduce at home"; of
            compute "up", "down" (forward), "down dgrad", "up dgrad", "wgrad" (backward).
        begin_ns: on a clock that all ranks of a host share. On "cuda" the GPU's clock, set by
            the host's where ranks have GPUs of their own.
        end_ns: on the same clock.
        tile: M-tile, token block or expert; -1 if none applies.
        local_bytes: bytes moved within the rank.
        link_bytes: bytes moved between ranks.
        flag: the flag that a wait waits for (see docs/architecture.md), or "link".
        column: on "cuda" the N-tile or N-chunk; else -1.
        cta: on "cuda" the CTA; else -1.
        lane: on "cuda" the thread of the CTA that records; else -1.

    On "cuda", CTAs record what the fused kernels do. Every other launch is one event: it has no
    tile and no CTA, and link_bytes alone. "plan" then includes the wait for the other ranks, unless
    a "wait" for source_ready stands before it. One "pull" covers many rows. A "wait" for
    tile_filled is recorded by the thread that loads ahead, so it may overlap the GEMM of the tile
    before.
    """

    rank: int
    role: str
    name: str
    begin_ns: int
    end_ns: int
    tile: int = -1
    local_bytes: int = 0
    link_bytes: int = 0
    flag: str = ""
    column: int = -1
    cta: int = -1
    lane: int = -1

    @property
    def is_work(self) -> bool:
        """Whether the event is a GEMM or a transfer, and neither a wait nor preparation."""
        return self.name not in _NO_WORK

    @property
    def worker(self) -> tuple[int, int]:
        """(cta, lane) that executes the event: one per CTA for compute, one per thread for comm."""
        return self.cta, -1 if self.role == "compute" else self.lane


def of_workers(events: Iterable[Event]) -> list[Event]:
    """Without launches, where CTAs have recorded: launches only prepare what CTAs do then."""
    all_events = list(events)
    return [event for event in all_events if event.cta >= 0] or all_events


Intervals = list[tuple[int, int]]  # [begin, end) in ns, disjoint and in order


def union(events: Iterable[Event]) -> Intervals:
    """The intervals that the events cover."""
    merged: Intervals = []
    for begin, end in sorted((e.begin_ns, e.end_ns) for e in events):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((begin, end))
    return merged


def length(intervals: Intervals) -> int:
    """Sum of the lengths in ns."""
    return sum(end - begin for begin, end in intervals)


def overlap(left: Intervals, right: Intervals) -> int:
    """Length of the intersection in ns."""
    total = i = j = 0
    while i < len(left) and j < len(right):
        total += max(0, min(left[i][1], right[j][1]) - max(left[i][0], right[j][0]))
        if left[i][1] < right[j][1]:
            i += 1
        else:
            j += 1
    return total


def difference(left: Intervals, right: Intervals) -> Intervals:
    """What of `left` lies outside of `right`."""
    found: Intervals = []
    j = 0
    for begin, end in left:
        while j < len(right) and right[j][1] <= begin:
            j += 1
        i = j
        while begin < end and i < len(right) and right[i][0] < end:
            if right[i][0] > begin:
                found.append((begin, right[i][0]))
            begin = right[i][1]
            i += 1
        if begin < end:
            found.append((begin, end))
    return found
