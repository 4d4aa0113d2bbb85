"""`Comparison`: timelines of the same calls in several modes, on one scale."""

from __future__ import annotations

import os

from cometrt.trace import perfetto, picture
from cometrt.trace.timeline import Timeline, hidden, milliseconds


class Comparison:
    """Timelines of the same calls, each from its own begin.

    Args:
        timelines: by name, such as {"sequential": ..., "fused": ...}.
    """

    def __init__(self, timelines: dict[str, Timeline]) -> None:
        self.timelines = dict(timelines)

    def save_json(self, path: str | os.PathLike[str]) -> None:
        """As `Timeline.save_json`; each rank of each timeline is a process."""
        perfetto.save_json(path, {name: of.events for name, of in self.timelines.items()})

    def save_png(
        self, path: str | os.PathLike[str], title: str = "", *, rank: int | None = None
    ) -> None:
        """Draw the timelines below each other, with one time axis, as `Timeline.save_png` does.

        Each has its time below its name. The title says what share of the communication the last
        one hides.
        """
        if self.timelines:
            name, last = list(self.timelines.items())[-1]
            hides = f"{': ' if title else ''}{name} hides "
            title += hidden(hides, last.hidden_share, " of the communication")
        sections = [
            picture.Section(name, of.passes, of.notes, milliseconds(of.span_sec * 1e9))
            for name, of in self.timelines.items()
        ]
        picture.save_png(path, sections, title, rank)
