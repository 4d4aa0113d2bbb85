"""Write a timeline as Chrome trace events, which Perfetto opens."""

from __future__ import annotations

import json
import os
from typing import Any

from cometrt.trace.events import ROLES, Event


def _label(event: Event) -> str:
    return f"{event.name} for {event.flag}" if event.flag else event.name


def save_json(path: str | os.PathLike[str], timelines: dict[str, list[Event]]) -> None:
    """Write Chrome trace events. Each timeline begins at 0 and has processes of its own.

    Args:
        timelines: by name, which is put before the ranks' names; sorted by their begins.
    """
    records: list[dict[str, Any]] = []
    first = 0  # process of rank 0
    for name, events in timelines.items():
        _add_records(records, events, f"{name} rank" if name else "rank", first)
        first += 1 + max((event.rank for event in events), default=0)
    with open(path, "w", encoding="utf-8") as file:
        # Not json.dump, which encodes in Python: it takes ten times as long.
        file.write(json.dumps({"traceEvents": records, "displayTimeUnit": "ms"}))


def _add_records(
    records: list[dict[str, Any]], events: list[Event], process: str, first: int
) -> None:
    """Args:
    process: name of a process, before the rank's number.
    first: process of rank 0.
    """
    start = events[0].begin_ns if events else 0
    for rank in sorted({e.rank for e in events}):
        records.append(_metadata("process_name", first + rank, 0, f"{process} {rank}"))
        records.append(_metadata("process_sort_index", first + rank, 0, first + rank))
    tracks = {}
    for number, track in enumerate(sorted({_track(e) for e in events}), start=len(ROLES)):
        rank, cta, role, lane = track
        tracks[track] = ROLES.index(role) if cta < 0 else number
        label = role if cta < 0 else f"CTA {cta} {role} {lane}"
        records.append(_metadata("thread_name", first + rank, tracks[track], label))
    for event in events:
        arguments = {
            "tile": event.tile,
            "column": event.column,
            "local_bytes": event.local_bytes,
            "link_bytes": event.link_bytes,
        }
        records.append(
            {
                "name": _label(event),
                "cat": event.role,
                "ph": "X",
                "ts": (event.begin_ns - start) / 1e3,
                "dur": (event.end_ns - event.begin_ns) / 1e3,
                "pid": first + event.rank,
                "tid": tracks[_track(event)],
                "args": arguments,
            }
        )


def _track(event: Event) -> tuple[int, int, str, int]:
    return event.rank, event.cta, event.role, event.lane


def _metadata(kind: str, process: int, lane: int, value: str | int) -> dict[str, Any]:
    key = "sort_index" if kind == "process_sort_index" else "name"
    return {"name": kind, "ph": "M", "pid": process, "tid": lane, "args": {key: value}}
