"""Write a timeline as a picture and as Chrome trace events."""

from __future__ import annotations

import json
import os
from typing import Any

from cometrt.trace.events import ROLES, Event

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
    "wait for source_ready": "#d7ccc8",
    "wait for tile_filled": "#cfd8dc",
    "wait for tile_done": "#e4e4e4",
    "wait for partials_ready": "#fff0b3",
    "wait for link": "#ffcdd2",
    "wait": "#e4e4e4",
}
_LANE_HEIGHT = 0.38  # of one role; a rank has height 1


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
        json.dump({"traceEvents": records, "displayTimeUnit": "ms"}, file)


def _track(event: Event) -> tuple[int, int, str, int]:
    return event.rank, event.cta, event.role, event.lane


def _metadata(name: str, rank: int, lane: int, label: str) -> dict[str, Any]:
    return {"name": name, "ph": "M", "pid": rank, "tid": lane, "args": {"name": label}}


def save_png(
    path: str | os.PathLike[str], events: list[Event], title: str, rank: int | None
) -> None:
    """As `Timeline.save_png`."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError as error:
        raise ImportError("save_png needs matplotlib: pip install 'cometrt[plot]'") from error

    start = events[0].begin_ns if events else 0
    lanes = _lanes(events, rank)
    figure = Figure(figsize=(13, 1.6 + 0.75 * _height(lanes)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for begin, height, _, of_lane in lanes:
        # Waits are drawn first, so that work covers them.
        for shown in ([e for e in of_lane if not e.is_work], [e for e in of_lane if e.is_work]):
            bars = [((e.begin_ns - start) / 1e6, (e.end_ns - e.begin_ns) / 1e6) for e in shown]
            colors = [_COLORS.get(_label(e), "#999999") for e in shown]
            axes.broken_barh(bars, (begin, height), facecolors=colors, linewidth=0)
    named = [(begin + height / 2, label) for begin, height, label, _ in lanes if label]
    axes.set_yticks([at for at, _ in named], [label for _, label in named])
    axes.invert_yaxis()
    axes.set_xlabel("ms")
    axes.set_xlim(left=0)
    axes.set_title(title, loc="left")
    names = [name for name in _COLORS if any(_label(e) == name for e in events)]
    figure.legend(
        handles=[Patch(color=_COLORS[name], label=name) for name in names],
        loc="outside lower center",
        ncols=min(max(len(names), 1), 6),
        frameon=False,
    )
    figure.savefig(path, dpi=120, format="png")


_Lane = tuple[float, float, str, list[Event]]  # begin, height, label, events


def _height(lanes: list[_Lane]) -> float:
    return max((begin + height for begin, height, _, _ in lanes), default=0.0)


def _lanes(events: list[Event], rank: int | None) -> list[_Lane]:
    """One lane per role of every rank, divided among its workers; or one per worker of `rank`."""
    lanes: list[_Lane] = []
    by_worker: dict[tuple[int, str, tuple[int, int]], list[Event]] = {}
    for event in events:
        if rank is None or event.rank == rank:
            by_worker.setdefault((event.rank, event.role, event.worker), []).append(event)
    for row, of_rank in enumerate(sorted({key[0] for key in by_worker})):
        for role, offset in (("compute", 0.0), ("comm", 0.42)):
            workers = sorted(key[2] for key in by_worker if key[:2] == (of_rank, role))
            for i, worker in enumerate(workers):
                of_worker = by_worker[of_rank, role, worker]
                if rank is None:
                    height = _LANE_HEIGHT / len(workers)
                    label = f"rank {of_rank} {role}" if i == len(workers) // 2 else ""
                    lanes.append((row + offset + i * height, height, label, of_worker))
                else:
                    cta, thread = worker
                    label = f"{role} {cta}" + (f" thread {thread}" if thread >= 0 else "")
                    lanes.append((len(lanes) * 0.3, 0.27, label, of_worker))
    return lanes
