"""`cometrt doctor`: what this machine has, and what is missing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cometrt.cli.checks import CHECKS, FAILED, NOTE, OK, SKIPPED, Line, Machine
from cometrt.cli.output import Output

_MARKS = {
    OK: "[green]ok[/]",
    NOTE: "[yellow]note[/]",
    SKIPPED: "[dim]-[/]",
    FAILED: "[bold red]failed[/]",
}


def run_checks(say: Callable[[str], None]) -> list[Line]:
    """All lines. A check that breaks is a failed line."""
    machine, lines = Machine(), list[Line]()
    for name, check in CHECKS.items():
        say(f"checking {name}")
        try:
            lines += check(machine)
        except Exception as error:  # the other checks still say what they find
            advice = "please report this as an error of cometrt"
            lines.append(Line(name, FAILED, f"{type(error).__name__}: {error}", advice))
    return lines


def run_doctor(output: Output) -> int:
    """Check, print, and return the exit status: 1 if a line has failed."""
    with output.working("checking this machine") as say:
        lines = run_checks(say)
    failed = sum(line.state == FAILED for line in lines)
    result = {"failed": failed, "checks": [dataclasses.asdict(line) for line in lines]}
    output.result(result, show)
    return 1 if failed else 0


def show(console: Console, found: dict[str, Any]) -> None:
    shown = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    shown.add_column(no_wrap=True)
    shown.add_column(no_wrap=True)
    shown.add_column(overflow="fold")
    for line in found["checks"]:
        text = escape(line["text"])
        if line["advice"]:
            text += f"\n[bold]{escape(line['advice'])}[/]"
        shown.add_row(_MARKS[line["state"]], line["check"], text)
    console.print(shown)
    count = found["failed"]
    if count:
        console.print(f"[bold red]{count} {'check' if count == 1 else 'checks'} failed[/]")
    else:
        console.print("[green]nothing failed[/]")
