"""Stacks of Transformer layers: their shapes, and what benchmarks.end_to_end writes of them.

A file is {"cells": {stack: entry}}. An entry has its machine, the stack's fields, the model's
shape, and "times": {contender: {"ms": spread, "without_ms": ms, "losses": [...]}}: milliseconds of
a step, and of one without MoE layers in the same process. "noisy_losses" are those of parameters
with noise. A contender that was not measured has {"skipped": reason}.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import cometrt
from cometrt.bench.records import read, write
from cometrt.bench.workloads import CAPACITY_FACTOR
from cometrt.models import MODELS, Model

OURS = ("fused", "sequential")
RIVALS = ("jax batched", "jax mosaic")


class Attention(NamedTuple):
    """Heads of queries, heads of keys and values, and the columns of a head."""

    heads: int
    kv_heads: int
    head_size: int


ATTENTION = {  # as in the models' published configurations
    "qwen3-30b-a3b": Attention(32, 4, 128),
    "mixtral-8x7b": Attention(32, 8, 128),
    "qwen2-moe": Attention(16, 16, 128),  # Qwen1.5-MoE-A2.7B
    "phi-3.5-moe": Attention(32, 8, 128),
    "tiny": Attention(4, 2, 16),
}
SHAPES = MODELS | {"tiny": Model(64, 96, 8, 2)}  # of no model: for the CPU


@dataclasses.dataclass(frozen=True)
class Stack:
    """What is measured.

    Args:
        model: of ATTENTION.
        ranks: W.
        layers: of the stack.
        sequence: tokens of a sequence.
        batch: sequences of each rank.
    """

    model: str
    ranks: int
    layers: int
    sequence: int
    batch: int

    def __str__(self) -> str:
        return f"{self.model} W={self.ranks} L={self.layers} S={self.sequence} B={self.batch}"

    @property
    def tokens(self) -> int:
        """T, of each rank."""
        return self.batch * self.sequence

    @property
    def shape(self) -> Model:
        return SHAPES[self.model]

    @property
    def attention(self) -> Attention:
        return ATTENTION[self.model]

    @property
    def spec(self) -> cometrt.MoESpec:
        shape = self.shape
        # Few tokens are spread unevenly.
        capacity = CAPACITY_FACTOR if self.tokens >= 1024 else float(self.ranks)
        return cometrt.MoESpec(
            hidden=shape.hidden,
            intermediate=shape.intermediate,
            num_experts=shape.num_experts,
            topk=shape.topk,
            max_tokens=self.tokens,
            capacity_factor=capacity,
        )


class Results:
    """A file of stacks. Contenders of this machine and commit join those that are there."""

    def __init__(self, path: Path | None, here: dict[str, Any]) -> None:
        self._path, self._here = path, here
        self.cells: dict[str, dict[str, Any]] = read(path).get("cells", {}) if path else {}

    def add(self, stack: Stack, row: dict[str, Any]) -> None:
        """Args:
        row: a contender and some of its results.
        """
        entry = self.cells.get(str(stack))
        if entry is None or any(entry["machine"][k] != self._here[k] for k in ("gpu", "commit")):
            shape = stack.shape._asdict() | stack.attention._asdict()
            entry = {"machine": self._here, "stack": vars(stack), "shape": shape, "times": {}}
            self.cells[str(stack)] = entry
        found = {key: value for key, value in row.items() if key not in ("stack", "contender")}
        times = entry["times"].setdefault(row["contender"], {})
        if "ms" in found:
            times.pop("skipped", None)
        if "ms" not in times or "skipped" not in found:  # what was measured earlier stays
            times |= found
        write(self._path, {"cells": self.cells})


def figures(entry: dict[str, Any], contender: str) -> dict[str, float]:
    """Of a contender that was measured; {} otherwise.

    ms: median of a step. tokens_per_sec: of all ranks. moe_share: of the step's time, what a step
    without MoE layers does not take. over_fused: its time over that of fused. loss_gap: the largest
    difference of its losses from those of fused, relative to these. loss_noise: that of its losses
    from those that start with the noise of rounding, where there are any.
    """
    found, fused = (entry["times"].get(name, {}) for name in (contender, "fused"))
    if "ms" not in found:
        return {}
    ms, stack = found["ms"]["median"], Stack(**entry["stack"])
    made = {
        "ms": ms,
        "tokens_per_sec": 1e3 * stack.ranks * stack.tokens / ms,
        "moe_share": 1 - found["without_ms"] / ms,
    }
    if "ms" in fused:
        made["over_fused"] = ms / fused["ms"]["median"]
        made["loss_gap"] = _gap(found["losses"], fused["losses"])
    if "noisy_losses" in found:
        made["loss_noise"] = _gap(found["noisy_losses"], found["losses"])
    return made


def _gap(losses: list[float], others: list[float]) -> float:
    """Of the steps that both have made."""
    return max(abs(one - other) / other for one, other in zip(losses, others, strict=False))


def lines(entry: dict[str, Any]) -> list[str]:
    """For the terminal: one of each contender."""
    made = []
    for name, times in entry["times"].items():
        found = figures(entry, name)
        if not found:
            made.append(f"  {name:12s} {times.get('skipped', 'not measured')}")
            continue
        text = f"  {name:12s} {found['ms']:8.3f} ms ({times['ms']['p10']:.3f} to "
        text += f"{times['ms']['p90']:.3f}) {found['tokens_per_sec']:9,.0f} tokens/s  "
        text += f"MoE {found['moe_share']:.0%}"
        if "over_fused" in found:
            text += f"  {found['over_fused']:.3f}x the time of fused"
        losses = times["losses"]
        text += f"  losses {losses[0]:.4g} to {losses[-1]:.4g}"
        if "loss_gap" in found:
            text += f", off by at most {found['loss_gap']:.1e}"
        if "loss_noise" in found:
            text += f", noise {found['loss_noise']:.1e}"
        made.append(f"{text}  (compiled in {times['compile_sec']:.0f} s)")
    return made
