"""One stretch of one role, and sums of such stretches."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

ROLES = ("comm", "compute")
_NO_WORK = ("wait", "publish", "plan")


class Event(NamedTuple):
    """One stretch of one role. Times in ns on a clock that all ranks of a host share; on "cuda"
    that of the GPU.

    Names: "publish", "plan", "wait"; comm "pull", "reduce and push", "reduce at home"; compute
    "up", "down" in forward, "down dgrad", "up dgrad", "wgrad" in backward.

    `tile` is an M-tile, a block of tokens or an expert, -1 where none applies; `local_bytes`
    and `link_bytes` are the bytes moved within the rank and between ranks. `flag` is what a wait
    was for: a flag of docs/architecture.md, or "link".

    On "cuda" `column` is the N-tile, or the chunk; `cta` is a CTA of the kernel and `lane` one of
    its threads. A pull is that of many rows there; a CTA's "wait" for tile_filled is that of the
    thread that loads ahead, while the last tile may still be multiplied. -1 elsewhere.
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
        """Neither waiting nor getting ready."""
        return self.name not in _NO_WORK

    @property
    def worker(self) -> tuple[int, int]:
        """Who works or waits, within a role of a rank: a CTA, or a thread that moves rows."""
        return self.cta, -1 if self.role == "compute" else self.lane


Stretches = list[tuple[int, int]]  # disjoint, in order


def union(events: Iterable[Event]) -> Stretches:
    """What the events cover."""
    merged: Stretches = []
    for begin, end in sorted((e.begin_ns, e.end_ns) for e in events):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((begin, end))
    return merged


def length(stretches: Stretches) -> int:
    return sum(end - begin for begin, end in stretches)


def overlap(left: Stretches, right: Stretches) -> int:
    """Length of the intersection."""
    total = i = j = 0
    while i < len(left) and j < len(right):
        total += max(0, min(left[i][1], right[j][1]) - max(left[i][0], right[j][0]))
        if left[i][1] < right[j][1]:
            i += 1
        else:
            j += 1
    return total
