"""Workloads that tests and benchmarks share: layers' shapes, routing, random inputs, errors.

Importing it needs NumPy alone; functions that take or make CuPy arrays say so.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

import cometrt
from cometrt.models import MODELS, Model

PASSES = {"forward": 6, "backward": 12, "both": 18}  # FLOPs of a pass over T * K * H * I
EXPERTS = {"deepseek-v3": 64}  # as many as fit on a GPU; other models: all
SHAPES = MODELS | {"wide-128": Model(4096, 1024, 128, 8)}  # of no model: many wide experts
CAPACITY_FACTOR = 1.25
# Tokens of a layer on one whole GPU, without an exchange.
ALONE = {
    "mixtral-8x7b": 8192,
    "qwen2-moe": 16384,
    "phi-3.5-moe": 8192,
    "qwen3-30b-a3b": 16384,
    "wide-128": 32768,
}


# ---- cells: what is measured -----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Cell:
    """One layer on W ranks.

    Args:
        model: of SHAPES.
        ranks, tp: W, TP.
        tokens: T, of each rank.
        link: that is emulated between virtual ranks; None: none.
        skew: coefficient of variation of the experts' loads.
        order: of the down GEMM's tiles.
    """

    model: str
    ranks: int = 8
    tp: int = 1
    tokens: int = 8192
    link: str | None = None
    skew: float = 0.0
    order: str = "phases"

    def __str__(self) -> str:
        tp = f" TP={self.tp}" if self.tp > 1 else ""
        link = f" link={self.link}" if self.link else ""
        skew = f" skew={self.skew}" if self.skew else ""
        order = f" {self.order}" if self.order != "phases" else ""
        return f"{self.model} W={self.ranks}{tp} T={self.tokens}{link}{skew}{order}"

    @property
    def config(self) -> cometrt.TileConfig:
        """The config of the fused layer."""
        n_chunk = 1024 if self.order == "columns" else 256
        return cometrt.TileConfig(order=self.order, n_chunk=n_chunk)

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

    def flops(self, which: str) -> float:
        """Floating-point operations of a pass on one rank. Recomputation does not count."""
        model = SHAPES[self.model]
        return float(PASSES[which]) * self.tokens * model.topk * model.hidden * model.intermediate


def cells(which: str, match: str = "") -> list[Cell]:
    """Cells of virtual ranks: "short", "models", "alone" (one rank) or "all".

    Args:
        match: comma list. A cell stays whose name has all words of one of its entries.
    """
    if which == "short":
        found = [Cell("qwen3-30b-a3b", link="h100"), Cell("mixtral-8x7b", link="h100")]
    else:
        found = [Cell(model, link="h100") for model in MODELS if which != "alone"]
    for model, tokens in ALONE.items() if which in ("alone", "all") else ():
        found.append(Cell(model, ranks=1, tokens=tokens))
    for model in MODELS if which == "all" else ():
        base = Cell(model, link="h100")
        found += [dataclasses.replace(base, ranks=ranks) for ranks in (2, 4)]
        found += [dataclasses.replace(base, link=link) for link in ("h800", None)]
        found += [dataclasses.replace(base, tp=tp) for tp in (2, 4, 8)]
        found += [dataclasses.replace(base, tokens=tokens) for tokens in (1024, 2048, 4096)]
        found += [dataclasses.replace(base, skew=skew) for skew in (0.08, 0.256, 0.4)]
        found.append(dataclasses.replace(base, order="columns"))
    filters = [words.split() for words in match.split(",")]
    return [c for c in found if any(all(w in str(c) for w in words) for words in filters)]


# ---- routing -----------------------------------------------------------------------------------


def distinct_experts(
    rng: np.random.Generator, tokens: tuple[int, ...], scores: np.ndarray, topk: int
) -> np.ndarray:
    """[*tokens, K] int32: distinct experts of each token, drawn with the scores as log-odds."""
    noisy = rng.gumbel(size=(*tokens, len(scores))) + scores
    return np.argpartition(-noisy, topk - 1, axis=-1)[..., :topk].astype(np.int32)


def routing(cell: Cell) -> np.ndarray:
    """[W, T, K] int32: uniform at random, or skewed as the cell says."""
    spec, rng = cell.spec, np.random.default_rng(0)
    z = rng.standard_normal(spec.num_experts)
    load = np.maximum(1 + cell.skew * (z - z.mean()) / z.std(), 0.01)
    shape = (cell.ranks, cell.tokens)
    return distinct_experts(rng, shape, np.log(load / load.sum()), spec.topk)


def crossing_bytes(cell: Cell, ids: np.ndarray) -> int:
    """Bytes of a dispatch in the busiest direction of a rank's link; a combine sends as many."""
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
    """Rows of the rank that has most, over the mean. Padding rows do not count."""
    groups = cell.ranks // cell.tp
    rows = np.bincount((ids // (cell.spec.num_experts // groups)).ravel(), minlength=groups)
    return float(rows.max() / rows.mean())


# ---- inputs ------------------------------------------------------------------------------------


@dataclasses.dataclass
class Inputs:
    """Arguments of a small layer, on the host. Lists have an entry for each rank. Weights are those
    of all experts."""

    x: list[np.ndarray]
    dy: list[np.ndarray]
    ids: list[np.ndarray]
    weights: list[np.ndarray]
    w_up: np.ndarray
    w_down: np.ndarray


def random_inputs(spec: cometrt.MoESpec, ids: list[np.ndarray], rng: np.random.Generator) -> Inputs:
    """Normal values, router weights in [0.1, 1.5); ids: [T, K] of each rank, T may differ."""

    def normal(*shape: int, scale: float = 1.0) -> np.ndarray:
        return (scale * rng.standard_normal(shape)).astype(spec.numpy_dtype)

    halves = 2 if spec.gated else 1
    return Inputs(
        x=[normal(len(i), spec.hidden) for i in ids],
        dy=[normal(len(i), spec.hidden) for i in ids],
        ids=ids,
        weights=[rng.uniform(0.1, 1.5, i.shape).astype(np.float32) for i in ids],
        w_up=normal(
            spec.num_experts, halves * spec.intermediate, spec.hidden, scale=spec.hidden**-0.5
        ),
        w_down=normal(
            spec.num_experts, spec.hidden, spec.intermediate, scale=spec.intermediate**-0.5
        ),
    )


def device_normal(shape: tuple[int, ...], scale: float = 1.0) -> Any:
    """A CuPy array of normal bf16 values, made part by part: memory is scarce."""
    import cupy as cp
    import ml_dtypes

    out = cp.empty(shape, ml_dtypes.bfloat16)
    flat = out.reshape(-1)
    for begin in range(0, flat.size, 1 << 26):
        part = flat[begin : begin + (1 << 26)]
        part[...] = (cp.random.standard_normal(part.size, dtype=cp.float32) * scale).astype(
            out.dtype
        )
    return out


# ---- errors --------------------------------------------------------------------------------------


def tolerance(dtype: str) -> float:
    """The largest `relative_error` from float64 that is allowed. With bfloat16, x, z, a, o, the
    partial sums and y each round by up to 2^-9. With float32, sums of up to a few hundred addends
    round by 2^-24 each."""
    return {"bfloat16": 1e-2, "float32": 3e-6}[dtype]


def relative_error(found: Any, expected: Any) -> float:
    """||found - expected|| / ||expected||, of NumPy's or of CuPy's arrays.

    Infinite if expected is zero and found is not, or if either has a NaN. On a GPU a few rows at a
    time in float32: memory is scarce.
    """
    if isinstance(found, np.ndarray):
        distance = float(np.linalg.norm(found.astype(np.float64) - expected))
        norm = float(np.linalg.norm(expected))
    else:
        import cupy as cp

        squares = cp.zeros(2, np.float64)
        found, expected = (array.reshape(-1) for array in (found, expected))
        for begin in range(0, found.size, 1 << 24):
            part = slice(begin, begin + (1 << 24))
            one, other = (array[part].astype(np.float32) for array in (found, expected))
            squares += cp.stack([((one - other) ** 2).sum(), (other**2).sum()])
        distance, norm = map(float, np.sqrt(squares.get()))
    if norm == 0:
        return 0.0 if distance == 0 else float("inf")
    error = distance / norm
    return error if error == error else float("inf")


# ---- kernels of benchmarks ---------------------------------------------------------------------


def cuda_function(source: Path, name: str) -> Any:
    """CuPy's function for a kernel of a .cu file, loaded on the current device.

    Loading may wait for the device: it must not happen while a peer's kernel waits for this rank.
    """
    import cupy as cp

    from cometrt.kernels.compiler import compile_cubin

    function = cp.RawModule(path=str(compile_cubin(source).path)).get_function(name)
    assert function.kernel is not None
    return function
