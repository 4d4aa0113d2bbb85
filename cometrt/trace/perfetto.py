"""Write a timeline as Chrome trace events, which Perfetto opens."""

from __future__ import annotations

import json
import os
from typing import Any

from cometrt.trace.events import ROLES, Event


def _label(event: Event) -> str:
    return f"{event.name} for {event.flag}" if event.flag else event.name


def save_json(path: str | os.PathLike[str], events: list[Event]) -> None:
    """Write Chrome trace events. `events` must be sorted by their begins."""
    start = events[0].begin_ns if events else 0
    records: list[dict[str, Any]] = []
    for rank in sorted({e.rank for e in events}):
        records.append(_metadata("process_name", rank, 0, f"rank {rank}"))
    tracks = {}
    for number, track in enumerate(sorted({_track(e) for e in events}), start=len(ROLES)):
        rank, cta, role, lane = track
        tracks[track] = ROLES.index(role) if cta < 0 else number
        label = role if cta < 0 else f"CTA {cta} {role} {lane}"
        records.append(_metadata("thread_name", rank, tracks[track], label))
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
                "pid": event.rank,
                "tid": tracks[_track(event)],
                "args": arguments,
            }
        )
    with open(path, "w", encoding="utf-8") as file:
        # Not json.dump, which encodes in Python: it takes ten times as long.
        file.write(json.dumps({"traceEvents": records, "displayTimeUnit": "ms"}))


def _track(event: Event) -> tuple[int, int, str, int]:
    return event.rank, event.cta, event.role, event.lane


def _metadata(name: str, rank: int, lane: int, label: str) -> dict[str, Any]:
    return {"name": name, "ph": "M", "pid": rank, "tid": lane, "args": {"name": label}}
