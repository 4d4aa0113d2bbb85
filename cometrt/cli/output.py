"""What commands print: results on stdout, as tables or as JSON; progress and errors on stderr.

rich is imported where it is used: examples/demo.py runs without it.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console, Group

Say = Callable[[str], None]
Show = Callable[["Console", dict[str, Any]], None]


class Output:
    """The terminal of one command. Only rank 0 of a command speaks."""

    def __init__(self, as_json: bool) -> None:
        from rich.console import Console

        self.as_json = as_json
        self.console = Console(highlight=False)
        self._errors = Console(stderr=True, highlight=False)

    @contextlib.contextmanager
    def working(self, text: str) -> Iterator[Say]:
        """Say what takes time, and for how long it has taken it. Yields a function that says what
        comes next; any thread may call it. Where stderr is no terminal, each is a line."""
        if not self._errors.is_terminal:

            def say(text: str) -> None:
                print(f"{text} ...", file=sys.stderr, flush=True)

            say(text)
            yield say
            return
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
        with Progress(*columns, console=self._errors, transient=True) as progress:
            task = progress.add_task(text, total=None)
            yield lambda text: progress.update(task, description=text)

    def result(self, result: dict[str, Any], show: Show) -> None:
        """Print it: as JSON, or by show(console, result)."""
        if self.as_json:
            print(json.dumps(_plain(result), indent=1, allow_nan=False))
        else:
            show(self.console, result)

    def error(self, text: str) -> None:
        from rich.markup import escape

        self._errors.print(f"[bold red]error:[/] {escape(text)}", soft_wrap=True)


def table(title: str, *columns: str, rows: list[list[str]], text: str = "") -> Group:
    """A table below its title. The first column is on the left; others are numbers.

    Args:
        text: the name of a last column, of words; "": there is none.
    """
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    made = Table(header_style="bold", box=box.SIMPLE_HEAD)
    for index, column in enumerate(columns):
        made.add_column(column, justify="right" if index else "left")
    if text:
        made.add_column(text)
    for row in rows:
        made.add_row(*row)
    return Group(Text(title, style="bold"), made)


def size(num_bytes: float) -> str:
    """Bytes as text with a binary unit."""
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.2f} GiB"


def percent(share: float | None) -> str:
    """A share as text; None or NaN: unknown."""
    return "unknown" if share is None or share != share else f"{share:.0%}"


def _plain(value: Any) -> Any:
    """Of what JSON has: no NaN, no tuples as keys, no NumPy numbers."""
    if isinstance(value, dict):
        return {str(key): _plain(of) for key, of in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(of) for of in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and value - value != 0:  # NaN, or infinite
        return None
    return value
