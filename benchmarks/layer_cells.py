"""What benchmarks/layer.py measures: cells, their routing, and the figures that follow from times.
Needs no GPU."""

from __future__ import annotations

import dataclasses
import statistics
from typing import Any

import numpy as np

import cometrt
from cometrt.models import MODELS, Model

EXPERTS = {"deepseek-v3": 64}  # what fits; others: all
CAPACITY_FACTOR = 1.25
REPLAYED_TOKENS = 4096  # up to here a call is a graph's replay
SHAPES = MODELS | {"wide-128": Model(4096, 1024, 128, 8)}  # one that no model has, SonicMoE's
# Tokens of a layer on one whole GPU, without an exchange.
ALONE = {
    "mixtral-8x7b": 8192,
    "qwen2-moe": 16384,
    "phi-3.5-moe": 8192,
    "qwen3-30b-a3b": 16384,
    "wide-128": 32768,
}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One point of the table; skew: coefficient of variation of the experts' loads."""

    model: str
    ranks: int = 8
    tp: int = 1
    tokens: int = 8192
    link: str | None = "h100"
    skew: float = 0.0
    order: str = "phases"

    def __str__(self) -> str:
        text = f"{self.model} W={self.ranks} TP={self.tp} T={self.tokens} link={self.link}"
        return (
            text
            + (f" skew={self.skew}" if self.skew else "")
            + (f" {self.order}" if self.order != "phases" else "")
        )

    @property
    def replayed(self) -> bool:
        return self.tokens <= REPLAYED_TOKENS

    @property
    def config(self) -> cometrt.TileConfig:
        """Of the fused layer."""
        chunk = 1024 if self.order == "columns" else 256
        return cometrt.TileConfig(order=self.order, n_chunk=chunk)

    @property
    def spec(self) -> cometrt.MoESpec:
        model = SHAPES[self.model]
        return cometrt.MoESpec(
            hidden=model.hidden,
            intermediate=model.intermediate,
            num_experts=EXPERTS.get(self.model, model.num_experts),
            topk=model.topk,
            max_tokens=self.tokens,
            tp=self.tp,
            capacity_factor=CAPACITY_FACTOR * (1 + 3 * self.skew),
        )

    @property
    def flops(self) -> float:
        model = SHAPES[self.model]
        return 6.0 * self.ranks * self.tokens * model.topk * model.hidden * model.intermediate


def cells(which: str, match: str = "") -> list[Cell]:
    """Of "short", "models", "alone" or "all"; match: a comma list of filters, of which one must
    fit: all of its words are in the cell's name."""
    if which == "short":
        found = [Cell("qwen3-30b-a3b"), Cell("mixtral-8x7b")]
    else:
        found = [Cell(model) for model in MODELS if which != "alone"]
    for model, tokens in ALONE.items() if which in ("alone", "all") else ():
        found.append(Cell(model, ranks=1, tokens=tokens, link=None))
    for model in MODELS if which == "all" else ():
        base = Cell(model)
        found += [dataclasses.replace(base, ranks=ranks) for ranks in (2, 4)]
        found += [dataclasses.replace(base, link=link) for link in ("h800", None)]
        found += [dataclasses.replace(base, tp=tp) for tp in (2, 4, 8)]
        found += [dataclasses.replace(base, tokens=tokens) for tokens in (1024, 2048, 4096)]
        found += [dataclasses.replace(base, skew=skew) for skew in (0.08, 0.256, 0.4)]
        found.append(dataclasses.replace(base, order="columns"))
    filters = [words.split() for words in match.split(",")]
    return [c for c in found if any(all(w in str(c) for w in words) for words in filters)]


def routing(cell: Cell) -> np.ndarray:
    """[W, T, K] int32: distinct experts, drawn with the loads that the skew says."""
    spec, rng = cell.spec, np.random.default_rng(0)
    z = rng.standard_normal(spec.num_experts)
    load = np.maximum(1 + cell.skew * (z - z.mean()) / z.std(), 0.01)
    noise = rng.gumbel(size=(cell.ranks, cell.tokens, spec.num_experts))
    noise += np.log(load / load.sum())
    return np.argpartition(-noise, spec.topk - 1, axis=2)[:, :, : spec.topk].astype(np.int32)


def crossing_bytes(cell: Cell, ids: np.ndarray) -> int:
    """Of the busiest direction of a rank's link, in dispatch; in combine they go back."""
    spec, size = cell.spec, cell.ranks
    experts = spec.num_experts // (size // spec.tp)
    wanted = np.zeros((size, size), np.int64)  # tokens [home, contributor]
    for home in range(size):
        for group in range(size // spec.tp):
            tokens = int(((ids[home] // experts) == group).any(axis=1).sum())
            wanted[home, group * spec.tp : (group + 1) * spec.tp] = tokens
    np.fill_diagonal(wanted, 0)
    return int(max(wanted.sum(axis=0).max(), wanted.sum(axis=1).max())) * 2 * spec.hidden


def busiest_rank(cell: Cell, ids: np.ndarray) -> float:
    """Rows of the rank that has most, over the mean; padding do not count."""
    groups = cell.ranks // cell.tp
    rows = np.bincount((ids // (cell.spec.num_experts // groups)).ravel(), minlength=groups)
    return float(rows.max() / rows.mean())


def figures(cell: Cell, slowest: dict[str, list[float]], crossing_ms: float) -> dict[str, Any]:
    """slowest: times of each contender, in ms; crossing_ms: D, and C, which is the same."""
    ms = {name: spread(times) for name, times in slowest.items()}
    median = {name: values["median"] for name, values in ms.items()}
    planning, fused, comp = median.pop("planning"), median["fused"], median["gemms"]
    chunked = min((name for name in median if name.startswith("chunked")), key=median.__getitem__)
    found: dict[str, Any] = {
        "ms": ms,
        "link_ms": crossing_ms,
        "tflops": {name: cell.flops / value / 1e9 for name, value in median.items()},
        "best_chunked": chunked,
        "speedup_over_sequential": median["sequential"] / fused,
        "speedup_over_chunked": median[chunked] / fused,
        "efficiency": max(comp, crossing_ms) / fused,
        "planning_share": planning / fused,
    }
    if 2 * crossing_ms >= 0.3 * comp:
        found["hidden_share"] = 1 - (fused - comp) / (2 * crossing_ms)
    return found


def spread(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    tenth = len(ordered) // 10
    return {
        "median": statistics.median(ordered),
        "p10": ordered[tenth],
        "p90": ordered[-1 - tenth],
    }


HEAD = (
    f"{'TFLOP/s in sum':46s}  fused  seq.  chunked      GEMMs | fused ms  link ms | "
    "over sequential, chunked; efficiency, hidden, planning; busiest rank"
)


def line(cell: Cell, found: dict[str, Any]) -> str:
    rate, chunked = found["tflops"], found["best_chunked"]
    hidden = f"{found['hidden_share']:.2f}" if "hidden_share" in found else "   -"
    return (
        f"{cell!s:46s} {rate['fused']:6.0f} {rate['sequential']:5.0f} {rate[chunked]:5.0f} "
        f"({chunked.removeprefix('chunked '):6s}) {rate['gemms']:4.0f} | "
        f"{found['ms']['fused']['median']:8.2f} {found['link_ms']:8.2f} | "
        f"{found['speedup_over_sequential']:5.2f} {found['speedup_over_chunked']:5.2f} "
        f"{found['efficiency']:5.2f} {hidden} {found['planning_share']:5.3f} "
        f"{found['busiest_rank']:5.2f}"
    )
