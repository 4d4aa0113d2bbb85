"""`cometrt tune`: the fastest config of a model's layer on this machine."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

from rich.console import Console

import cometrt
from cometrt.cli.output import table
from cometrt.models import scaled_spec
from cometrt.tuner.cache import cache_file


def run(world: cometrt.World, model: str, tokens: int, tp: int, training: bool) -> dict[str, Any]:
    """Collective: tune a layer of the model, in full size."""
    layer = cometrt.MoELayer(world, scaled_spec(model, max_tokens=tokens, tp=tp), "fused")
    before, begin = layer.config, time.perf_counter()
    config = layer.tune(training=training)
    seconds = time.perf_counter() - begin
    layer.close()
    return {
        "model": model, "tokens": tokens, "ranks": world.size, "tp": tp, "seconds": seconds,
        "before": dataclasses.asdict(before), "config": dataclasses.asdict(config),
        "file": str(cache_file()),
    }  # fmt: skip


def show(console: Console, found: dict[str, Any]) -> None:
    title = (
        f"{found['model']}, {found['tokens']} tokens on each of {found['ranks']} ranks, "
        f"TP={found['tp']}: tuned in {found['seconds']:.0f} s"
    )
    before = found["before"]
    rows = [
        [name, str(before[name]), f"[bold]{value}[/]" if value != before[name] else str(value)]
        for name, value in found["config"].items()
    ]
    console.print(table(title, "setting", "before", "now", rows=rows))
    console.print(f"kept in {found['file']}", soft_wrap=True, markup=False)
