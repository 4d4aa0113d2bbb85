"""Draw a timeline as a PNG: ranks as rows, compute above communication, passes side by side."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from cometrt.trace.events import Event, difference, union
from cometrt.trace.passes import Pass

GROUPS = {  # of the legend: colors by label
    "compute, forward": {"up": "#1f7a4d", "down": "#7cc68d"},
    "compute, backward": {"down dgrad": "#17528f", "up dgrad": "#5b9fd6", "wgrad": "#3b3a7c"},
    "communication": {
        "pull": "#f4a340", "reduce and push": "#dd5a2b", "reduce at home": "#a63a63",
    },
    "preparation": {"publish": "#6a4fa3", "plan": "#b39ddb"},
    "waits for": {
        "source_ready": "#32363a", "tile_filled": "#5f656b", "tile_done": "#8f959b",
        "partials_ready": "#b9bec3", "link": "#dde0e2",
    },
}  # fmt: skip
WHITE = "idle, or not recorded:\nbetween launches and calls,\nand where a lane has ended"
HEIGHT = "share of the CTAs, or of\ntheir threads that move rows"
_COLORS = {label: color for labels in GROUPS.values() for label, color in labels.items()}
_LABELS = list(_COLORS)
_DPI, _WIDTH, _MAX_HEIGHT = 120, 13.0, 16.0  # dots an inch, inches
_BINS = 1500  # of a pass's time, where a lane has several workers
_ROLES = (("compute", 0.0), ("comm", 0.43))  # and where their lanes begin; a rank has height 1
_LANE_HEIGHT = 0.41
_NO_CTA = (-1, -1)  # worker of launches, and of the host's roles
_INK, _QUIET = "#22262a", "#6b7177"
_BOLD: dict[str, Any] = {"weight": "bold", "color": _INK, "va": "center"}
_ABOVE, _BELOW = 0.42, 1.68  # inches: for the brackets above a timeline; for the legend


class Section(NamedTuple):
    """A timeline to draw. Times count from its own begin.

    Attributes:
        name: is drawn above its ranks.
        passes: of the timeline.
        notes: of each pass, drawn above it.
        time: is drawn below the name.
    """

    name: str
    passes: list[Pass]
    notes: list[str]
    time: str = ""

    @property
    def begin_ns(self) -> int:
        return min((one.begin_ns for one in self.passes), default=0)

    @property
    def end_ns(self) -> int:
        return max((one.end_ns for one in self.passes), default=1)


def save_png(
    path: str | os.PathLike[str], sections: list[Section], title: str, rank: int | None
) -> None:
    """As `Timeline.save_png`, of timelines below each other, on one scale."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("save_png needs matplotlib: pip install 'cometrt[plot]'") from error

    all_lanes = [
        _lanes(of.passes) if rank is None else _worker_lanes(of.passes, rank) for of in sections
    ]
    scale = min(0.72, _MAX_HEIGHT / max(1, sum(lanes.height for lanes in all_lanes)))
    inches = [max(scale * lanes.height, 0.6) for lanes in all_lanes]
    height = 0.3 + sum(_ABOVE + inch for inch in inches) + _BELOW
    figure = Figure(figsize=(_WIDTH, height), dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)
    longest = max((of.end_ns - of.begin_ns for of in sections), default=1)
    bottom = height - 0.3
    for section, lanes, inch in zip(sections, all_lanes, inches, strict=True):
        bottom -= _ABOVE + inch
        axes = figure.add_axes((0.09, bottom / height, 0.898, inch / height))
        _draw_section(axes, section, lanes, longest, is_last=section is sections[-1])
        top = bottom + inch
        figure.text(0.012, (top + 0.26) / height, section.name, fontsize=11, **_BOLD)
        figure.text(0.012, (top + 0.05) / height, section.time, fontsize=9, color=_QUIET)
    figure.text(0.012, 1 - 0.22 / height, title, fontsize=13, **_BOLD)
    passes, is_stacked = [one for of in sections for one in of.passes], rank is None
    _draw_legend(figure.add_axes((0.012, 0.0, 0.976, 1.2 / height)), passes, is_stacked)
    figure.savefig(path, format="png")


def _draw_section(
    axes: Any, section: Section, lanes: _Lanes, longest: int, *, is_last: bool
) -> None:
    """longest: time that the axis spans, in ns. is_last: the axis has numbers."""
    lanes.draw(axes, section.begin_ns)
    for at, name in lanes.ranks:
        axes.text(-0.087, at, name, transform=axes.get_yaxis_transform(), fontsize=10, **_BOLD)
    axes.set_xlim(0, longest / 1e6)
    axes.set_ylim(max(lanes.height, 0.5), -0.02)
    axes.set_yticks([at for at, _ in lanes.names], [name for _, name in lanes.names])
    axes.tick_params(axis="y", length=0, labelsize=8.5, colors=_QUIET)
    axes.tick_params(axis="x", labelsize=8.5, colors=_QUIET, labelbottom=is_last)
    if is_last:
        axes.set_xlabel("ms", fontsize=9, color=_QUIET)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#c4c8cc")
    _draw_passes(axes, section)


def _label(event: Event) -> str:
    return event.flag if event.name == "wait" else event.name


class _Lanes:
    """Boxes to draw, and names of rows; y grows downwards."""

    def __init__(self) -> None:
        self.height = 0.0
        self.names: list[tuple[float, str]] = []
        self.ranks: list[tuple[float, str]] = []
        self.borders: list[tuple[float, float, float]] = []  # ns, and from where to where
        self._boxes: dict[str, list[np.ndarray]] = {}  # by label: [n, 4] begin, end, top, bottom

    def add(self, label: str, begin: Any, end: Any, top: Any, bottom: Any) -> None:
        """Boxes, whose arguments are arrays or numbers."""
        boxes = np.stack(np.broadcast_arrays(begin, end, top, bottom), axis=-1).astype(np.float64)
        self._boxes.setdefault(label, []).append(boxes.reshape(-1, 4))

    def draw(self, axes: Any, start: int) -> None:
        """All boxes of a label at once: thousands of single ones would take minutes."""
        from matplotlib.collections import PolyCollection

        waits_first = sorted(self._boxes, key=lambda label: label not in GROUPS["waits for"])
        for label in waits_first:
            begin, end, top, bottom = np.concatenate(self._boxes[label]).T
            begin, end = (begin - start) / 1e6, (end - start) / 1e6
            corners = ((begin, top), (end, top), (end, bottom), (begin, bottom))
            polygons: Any = np.stack([np.stack(corner, axis=-1) for corner in corners], axis=1)
            color = _COLORS.get(label, "#c0392b")
            axes.add_collection(PolyCollection(polygons, facecolors=color, linewidths=0))
        for at, top, bottom in self.borders:
            at = (at - start) / 1e6
            axes.plot([at, at], [top, bottom], color=_INK, linewidth=0.8, linestyle=(0, (3, 2)))


def _lanes(passes: list[Pass]) -> _Lanes:
    """Two lanes a rank, compute and comm."""
    lanes = _Lanes()
    ranks = sorted({event.rank for one in passes for event in one.events})
    for row, rank in enumerate(ranks):
        lanes.ranks.append((row * 1.12 + 0.42, f"rank {rank}"))
        for role, offset in _ROLES:
            top = row * 1.12 + offset
            lanes.names.append((top + _LANE_HEIGHT / 2, role))
            for one in passes:
                workers = _by_worker(e for e in one.of_rank(rank) if e.role == role)
                _add_bars(lanes, workers.pop(_NO_CTA, []), top, _LANE_HEIGHT)
                if workers:
                    _add_shares(lanes, list(workers.values()), one, top)
        for one in passes[1:]:
            if events := one.of_rank(rank):
                lanes.borders.append((events[0].begin_ns, row * 1.12 - 0.03, row * 1.12 + 0.87))
    lanes.height = len(ranks) * 1.12 - 0.2
    return lanes


def _worker_lanes(passes: list[Pass], rank: int) -> _Lanes:
    """A lane for each worker of one rank."""
    lanes, row, height = _Lanes(), 0, 0.3
    workers: dict[tuple[str, tuple[int, int]], list[Event]] = {}
    for one in passes:
        for event in one.of_rank(rank):
            workers.setdefault((event.role, event.worker), []).append(event)
    step = max(1, -(-len(workers) // 110))  # names that still can be read
    for role, _ in _ROLES:
        for key in sorted(key for key in workers if key[0] == role):
            cta, thread = key[1]
            name = f"{role} {cta}" if cta >= 0 else role
            name += f".{thread}" if thread >= 0 else ""
            if row % step == 0:
                lanes.names.append((row * height + 0.13, name))
            _add_bars(lanes, workers[key], row * height, 0.26)
            row += 1
    lanes.height = row * height
    for one in passes[1:]:
        if events := one.of_rank(rank):
            lanes.borders.append((events[0].begin_ns, 0, lanes.height))
    return lanes


def _by_worker(events: Iterable[Event]) -> dict[tuple[int, int], list[Event]]:
    workers: dict[tuple[int, int], list[Event]] = {}
    for event in events:
        workers.setdefault(event.worker, []).append(event)
    return workers


def _add_bars(lanes: _Lanes, events: list[Event], top: float, height: float) -> None:
    """A bar for each event."""
    labels: dict[str, list[tuple[int, int]]] = {}
    for event in events:
        labels.setdefault(_label(event), []).append((event.begin_ns, event.end_ns))
    for label, times in labels.items():
        begin, end = np.array(times).T
        lanes.add(label, begin, end, top, top + height)


def _add_shares(lanes: _Lanes, workers: list[list[Event]], one: Pass, top: float) -> None:
    """Colors stacked on each other: the height of each is the share of the workers that do it."""
    edges = np.linspace(one.begin_ns, one.end_ns, _BINS + 1)
    times: dict[str, list[tuple[int, int]]] = {}
    for events in workers:
        work = union(event for event in events if event.is_work)
        for label in dict.fromkeys(map(_label, events)):
            of_label = [event for event in events if _label(event) == label]
            intervals = union(of_label)
            if not of_label[0].is_work:  # a CTA that waits and works at once, works
                intervals = difference(intervals, work)
            times.setdefault(label, []).extend(intervals)
    width = (edges[1] - edges[0]) * len(workers)
    base = np.full(_BINS, top + _LANE_HEIGHT)
    for label in [*_LABELS, *(label for label in times if label not in _COLORS)]:
        if times.get(label):
            share = np.diff(_covered(np.array(times[label]), edges)) / width
            height = _LANE_HEIGHT * np.clip(share, 0, 1)
            shown = height > 1e-4
            upper = np.maximum(base - height, top)
            lanes.add(label, edges[:-1][shown], edges[1:][shown], upper[shown], base[shown])
            base = upper


def _covered(intervals: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Sum of the parts of all intervals [n, 2] that lie before each edge."""
    total = np.zeros(len(edges))
    for column, sign in ((0, 1.0), (1, -1.0)):  # the sum of max(0, edge - begin), less that of ends
        times = np.sort(intervals[:, column]).astype(np.float64) - edges[0]
        sums = np.concatenate([[0.0], np.cumsum(times)])
        count = np.searchsorted(times, edges - edges[0])
        total += sign * (count * (edges - edges[0]) - sums[count])
    return total


def _draw_passes(axes: Any, section: Section) -> None:
    """A bracket above each pass, with its note."""
    top = axes.get_xaxis_transform()  # x in ms, y in heights of the axes
    inch = 1 / (axes.get_position().height * axes.figure.get_size_inches()[1])
    start, before = section.begin_ns, 0.0
    for one, note in zip(section.passes, section.notes, strict=True):
        begin, end = max((one.begin_ns - start) / 1e6, before), (one.end_ns - start) / 1e6
        before = end
        color = next(iter(GROUPS[f"compute, {one.name}"].values()))
        y, above = 1 + 0.07 * inch, {"transform": top, "color": color, "clip_on": False}
        axes.plot([begin, end], [y, y], linewidth=3, solid_capstyle="butt", **above)
        axes.text(begin, y + 0.06 * inch, note, fontsize=9.5, va="bottom", **above)


def _draw_legend(axes: Any, passes: list[Pass], is_stacked: bool) -> None:
    """A column for each group of colors that the picture has, and what white and height mean."""
    from matplotlib.patches import Rectangle

    axes.set_axis_off()
    axes.set_xlim(0, 12.7)
    axes.set_ylim(1.2, 0)
    there = {_label(event) for one in passes for event in one.events}
    x = 0.0
    for group, colors in GROUPS.items():
        shown = [label for label in colors if label in there]
        if not shown:
            continue
        axes.text(x, 0.1, group, fontsize=9, weight="bold", color=_INK, va="center")
        for line, label in enumerate(shown):
            y = 0.32 + 0.2 * line
            box = Rectangle((x, y - 0.065), 0.24, 0.13, facecolor=colors[label], linewidth=0)
            axes.add_patch(box)
            axes.text(x + 0.32, y, label, fontsize=9, color=_INK, va="center")
        x += 1.75
    texts = {"white": WHITE}
    if is_stacked and any(event.cta >= 0 for one in passes for event in one.events):
        texts["height"] = HEIGHT
    for heading, text in texts.items():
        axes.text(x, 0.1, heading, fontsize=9, weight="bold", color=_INK, va="center")
        axes.text(x, 0.25, text, fontsize=9, color=_INK, va="top", linespacing=1.4)
        x += 2.2
