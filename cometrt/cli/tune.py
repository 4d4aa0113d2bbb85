"""`cometrt tune`: the fastest config of a model's layer on this machine."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console

import cometrt
from cometrt.cli.output import Say, table
from cometrt.models import scaled_spec
from cometrt.tuner.cache import cache_file

SAY_SEC = 1.0  # between two lines of progress


def run(
    world: cometrt.World,
    model: str,
    tokens: int,
    tp: int,
    training: bool,
    budget_sec: float,
    say: Say,
) -> dict[str, Any]:
    """Collective: tune a layer of the model, in full size.

    Args:
        budget_sec: as for `MoELayer.tune`.
    """
    layer = cometrt.MoELayer(world, scaled_spec(model, max_tokens=tokens, tp=tp), "fused")
    before, begin, trials = layer.config, time.perf_counter(), 0
    said = told(f"tuning {model}, {tokens} tokens a rank", say)

    def watch(count: int, best_ms: dict[str, float]) -> None:
        nonlocal trials
        trials = count
        said(count, best_ms)

    config = layer.tune(training=training, budget_sec=budget_sec, progress=watch)
    seconds = time.perf_counter() - begin
    layer.close()
    return {
        "model": model, "tokens": tokens, "ranks": world.size, "tp": tp, "seconds": seconds,
        "trials": trials, "file": str(cache_file()),
        "before": dataclasses.asdict(before), "config": dataclasses.asdict(config),
    }  # fmt: skip


def told(text: str, say: Say) -> Callable[[int, dict[str, float]], None]:
    """A function for `MoELayer.tune` that says how far it is, at most once in SAY_SEC."""
    next_time = 0.0

    def progress(count: int, best_ms: dict[str, float]) -> None:
        nonlocal next_time
        if time.monotonic() >= next_time:
            next_time = time.monotonic() + SAY_SEC
            best = ", ".join(f"{which} {ms:.3f} ms" for which, ms in best_ms.items())
            say(f"{text}: {count} trials, fastest {best}")

    return progress


def show(console: Console, found: dict[str, Any]) -> None:
    title = (
        f"{found['model']}, {found['tokens']} tokens on each of {found['ranks']} ranks, "
        f"TP={found['tp']}: tuned in {found['seconds']:.0f} s, {found['trials']} trials"
    )
    before = found["before"]
    rows = [
        [name, str(before[name]), f"[bold]{value}[/]" if value != before[name] else str(value)]
        for name, value in found["config"].items()
    ]
    console.print(table(title, "setting", "before", "now", rows=rows))
    console.print(f"kept in {found['file']}", soft_wrap=True, markup=False)
