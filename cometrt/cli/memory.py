"""`cometrt memory`: what a model's layer takes on each rank."""

from __future__ import annotations

import dataclasses
from typing import Any

from rich.console import Console

from cometrt.cli.output import size, table
from cometrt.models import scaled_spec

_PARTS = {
    "heap": "peers read and write it",
    "residuals": "`saved` of one forward",
    "scratch": "of a call",
    "weights": "w_up and w_down",
    "gradients": "of the weights, as large as they are",
    "total": "",
}


def run(
    model: str,
    ranks: int,
    tp: int,
    tokens: list[int],
    scale: int,
    save: str,
    mode: str | None,
    training: bool,
    device: str,
) -> dict[str, Any]:
    """Bytes by number of tokens and part; arguments as of `MoESpec` and `MoESpec.memory`."""
    found = {}
    for count in tokens:
        spec = scaled_spec(model, scale, max_tokens=count, tp=tp, save=save)
        memory = spec.memory(ranks, device=device, mode=mode, training=training)
        gradients = memory.weights if training else 0
        found[count] = dataclasses.asdict(memory) | {
            "gradients": gradients,
            "total": memory.total + gradients,
        }
    return {
        "model": model, "scale": scale, "ranks": ranks, "tp": tp, "device": device, "save": save,
        "training": training, "bytes": found,
    }  # fmt: skip


def show(console: Console, found: dict[str, Any]) -> None:
    scaled = "" if found["scale"] == 1 else f" / {found['scale']}"
    title = (
        f"{found['model']}{scaled}: memory of a layer on each of {found['ranks']} ranks, "
        f"TP={found['tp']}, {found['device']}"
    )
    counts = found["bytes"]
    rows = [
        [part, *(size(of[part]) for of in counts.values()), text]
        for part, text in _PARTS.items()
        if any(of[part] for of in counts.values())
    ]
    heads = [f"{count} tokens" for count in counts]
    console.print(table(title, "part", *heads, rows=rows, text="what"))
