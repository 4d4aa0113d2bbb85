"""Cases of the layer: random inputs of every kind of routing, run on a world, and checked.

A case runs the same under `spawn` and under mpirun: its inputs come from its seed alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

import cometrt
from cometrt.bench.workloads import (
    Inputs,
    distinct_experts,
    random_inputs,
    relative_error,
    tolerance,
)

RANKS = [  # (W, TP)
    (1, 1), (2, 1), (2, 2), (3, 1), (3, 3), (4, 1), (4, 2), (4, 4), (5, 1), (8, 1), (8, 2), (8, 4),
]  # fmt: skip
ACTIVATIONS = ["swiglu", "geglu", "silu", "gelu", "relu", "relu2"]
MAX_TOKENS = 40
HIDDEN = 48
TOPK = 3


@dataclasses.dataclass(frozen=True)
class Case:
    ranks: tuple[int, int] = (4, 1)
    routing: str = "uniform"
    activation: str = "swiglu"
    dtype: str = "bfloat16"
    shard_columns: int = 48  # I_s; block_n is 32
    save: str = "rows"
    order: str = "phases"
    mode: str | None = None
    seed: int = 0
    gemm: str = "cublas"  # on "cuda"; the engine has M-tiles of 128
    # Over several nodes; they have the same inputs.
    slices: int = 1
    wanted_only: bool = False  # whether only wanted tokens cross, of which as many as there are may
    late: int = 0  # parts that arrive late

    @property
    def size(self) -> int:
        return self.ranks[0]

    @property
    def spec(self) -> cometrt.MoESpec:
        size, tp = self.ranks
        more = {"rail_tokens": MAX_TOKENS} if self.wanted_only else {}
        return cometrt.MoESpec(
            hidden=HIDDEN,
            intermediate=self.shard_columns * tp,
            num_experts=4 * (size // tp),
            topk=TOPK,
            max_tokens=MAX_TOKENS + 5 * self.wanted_only,
            tp=tp,
            activation=self.activation,
            dtype=self.dtype,
            save=self.save,
            capacity_factor=4.0 * size,  # every routing fits
            **more,
        )

    @property
    def config(self) -> cometrt.TileConfig:
        return cometrt.TileConfig(
            block_m=16 if self.gemm == "cublas" else 128,
            block_n=32,
            block_tokens=8,
            min_token_blocks=6 if self.seed else 1,
            order=self.order,
            num_phases=3 if self.seed else 2,
            n_chunk=32 if self.gemm == "cublas" else 256,
            gemm=self.gemm,
            rail_slices=self.slices,
            rail_parts=self.late,
        )

    def __str__(self) -> str:
        return "-".join(str(v) for v in dataclasses.astuple(self)[:-3]).replace(" ", "")


def make_inputs(case: Case) -> Inputs:
    rng = np.random.default_rng(zlib.crc32(str(case).encode()))
    ids = [
        table.astype(np.int64 if rank % 2 else np.int32)
        for rank, table in enumerate(ROUTINGS[case.routing](case, rng))
    ]
    return random_inputs(case.spec, ids, rng)


# ---- routings: (case, rng) -> ids [T, K] of each rank -------------------------------------------

_Routing = Callable[[Case, np.random.Generator], list[np.ndarray]]


def _draw(rng: np.random.Generator, tokens: int, scores: np.ndarray) -> np.ndarray:
    return distinct_experts(rng, (tokens,), scores, TOPK)


def _tokens(case: Case, rng: np.random.Generator) -> list[int]:
    return [int(t) for t in rng.integers(MAX_TOKENS // 2, MAX_TOKENS + 1, case.size)]


def _uniform(case: Case, rng: np.random.Generator) -> list[np.ndarray]:
    return [_draw(rng, t, np.zeros(case.spec.num_experts)) for t in _tokens(case, rng)]


def _skewed(case: Case, rng: np.random.Generator) -> list[np.ndarray]:
    scores = rng.normal(scale=2.0, size=case.spec.num_experts)
    ids = [_draw(rng, t, scores) for t in _tokens(case, rng)]
    return [np.where(rng.random(i.shape) < 0.1, -1, i) for i in ids]


def _one_expert(case: Case, rng: np.random.Generator) -> list[np.ndarray]:
    ids = _all_dropped(case, rng)
    for table in ids:
        table[:, 1] = case.spec.num_experts - 1
    return ids


def _empty_rank(case: Case, rng: np.random.Generator) -> list[np.ndarray]:
    ids = _uniform(case, rng)
    ids[case.size // 2] = ids[case.size // 2][:0]
    return ids


def _idle_experts(case: Case, rng: np.random.Generator) -> list[np.ndarray]:
    scores = np.zeros(case.spec.num_experts)
    scores[: len(scores) // 4] = -np.inf  # the whole first group where there are four
    return [_draw(rng, t, scores) for t in _tokens(case, rng)]


def _all_dropped(case: Case, rng: np.random.Generator) -> list[np.ndarray]:
    return [np.full((t, TOPK), -1) for t in _tokens(case, rng)]


def _one_token(case: Case, rng: np.random.Generator) -> list[np.ndarray]:
    tokens = [0] * (case.size - 1) + [1]
    return [_draw(rng, t, np.zeros(case.spec.num_experts)) for t in tokens]


def _at_home(case: Case, rng: np.random.Generator) -> list[np.ndarray]:
    experts = case.spec.num_experts // (case.size // case.spec.tp)
    return [
        rank // case.spec.tp * experts + _draw(rng, t, np.zeros(experts))
        for rank, t in enumerate(_tokens(case, rng))
    ]


ROUTINGS: dict[str, _Routing] = {
    "uniform": _uniform,
    "skewed": _skewed,
    "one_expert": _one_expert,
    "empty_rank": _empty_rank,
    "idle_experts": _idle_experts,
    "all_dropped": _all_dropped,
    "one_token": _one_token,
    "at_home": _at_home,
}


# ---- running and checking ----------------------------------------------------------------------


@dataclasses.dataclass
class Output:
    y: np.ndarray
    grads: cometrt.Gradients

    def digest(self) -> str:
        hashed = hashlib.sha256(self.y.tobytes())
        for grad in self.grads:
            hashed.update(grad.tobytes())
        return hashed.hexdigest()


def poisoned(shape: tuple[int, ...], dtype: np.dtype | type) -> np.ndarray:
    return np.full(shape, np.nan, dtype)


def on_device(world: cometrt.World) -> Callable[[np.ndarray], Any]:
    """Moves an array to where the world's layers want it."""
    if world.device == "host":
        return lambda array: array
    import cupy

    return cupy.asarray


def on_host(array: Any) -> np.ndarray:
    return array if isinstance(array, np.ndarray) else array.get()


def run_case(world: cometrt.World, case: Case, inputs: Inputs, repeats: int = 2) -> Output:
    """Forward and backward `repeats` times into poisoned outputs; the bits must repeat."""
    rank, spec, dtype, move = world.rank, case.spec, case.spec.numpy_dtype, on_device(world)
    w_up, w_down = map(
        move, cometrt.shard_weights(inputs.w_up, inputs.w_down, rank, case.size, spec)
    )
    x, dy, ids, weights = map(
        move, (inputs.x[rank], inputs.dy[rank], inputs.ids[rank], inputs.weights[rank])
    )
    wgrad_dtype = np.float32 if case.seed % 2 else dtype
    outputs = []
    with cometrt.MoELayer(world, spec, case.mode, config=case.config) as layer:
        for _ in range(repeats):
            y, saved = layer.forward(
                x, ids, weights, w_up, w_down, out=move(poisoned(x.shape, dtype))
            )
            out = cometrt.Gradients(
                move(poisoned(x.shape, dtype)),
                move(poisoned(weights.shape, np.float32)),
                move(poisoned(w_up.shape, wgrad_dtype)),
                move(poisoned(w_down.shape, wgrad_dtype)),
            )
            grads = layer.backward(dy, saved, out=out)
            layer.synchronize()
            outputs.append(Output(on_host(y), cometrt.Gradients(*map(on_host, grads))))
    assert len({output.digest() for output in outputs}) == 1, "bits differ between repeats"
    return outputs[0]


_Reference = tuple[np.ndarray, cometrt.Gradients]
_references: dict[Any, tuple[Inputs, _Reference]] = {}
_KEPT = 4  # references; those of wide layers have some hundred megabytes each


def reference_of(inputs: Inputs, activation: str) -> _Reference:
    """y and the gradients of all ranks' tokens together, in float64.

    The last few are kept. They are found again by what the tokens and tables hold, and by the
    identity of the weights, which nobody writes to.
    """
    x, dy, ids, weights = (
        np.concatenate(part) for part in (inputs.x, inputs.dy, inputs.ids, inputs.weights)
    )
    hashed = hashlib.blake2b()
    for array in (x, dy, ids, weights):
        hashed.update(f"{array.shape} {array.dtype}".encode())
        hashed.update(np.ascontiguousarray(array).view(np.uint8))
    key = activation, hashed.digest(), id(inputs.w_up), id(inputs.w_down)
    if key not in _references:
        while len(_references) >= _KEPT:
            del _references[next(iter(_references))]
        model = (x, ids, weights, inputs.w_up, inputs.w_down, activation)
        y = cometrt.reference.moe_forward(*model)
        found = y, cometrt.reference.moe_backward(dy, *model)
        # The weights stay, so that no other array gets their identity.
        _references[key] = dataclasses.replace(inputs), found
    return _references[key][1]


def check_case(case: Case, inputs: Inputs, outputs: list[Output]) -> None:
    """Compare all ranks' outputs with the float64 reference."""
    spec = case.spec
    y, grads = reference_of(inputs, spec.activation)
    pairs = {
        "y": (np.concatenate([o.y for o in outputs]), y),
        "dx": (np.concatenate([o.grads.x for o in outputs]), grads.x),
        "dweight": (np.concatenate([o.grads.topk_weights for o in outputs]), grads.topk_weights),
    }
    for rank, output in enumerate(outputs):
        dw_up, dw_down = cometrt.shard_weights(grads.w_up, grads.w_down, rank, case.size, spec)
        pairs[f"dw_up of rank {rank}"] = (output.grads.w_up, dw_up)
        pairs[f"dw_down of rank {rank}"] = (output.grads.w_down, dw_down)
    for name, (found, expected) in pairs.items():
        assert found.shape == expected.shape, name
        error = relative_error(found, expected)
        few = 10 if expected.size < 32 else 1  # a handful of dot products may all cancel
        assert error < few * tolerance(case.dtype), f"{name}: relative error {error:.2e} in {case}"


def spawn_case(
    case: Case, repeats: int = 2, device: str = "host", timeout_sec: float | None = None
) -> list[Output]:
    inputs = make_inputs(case)
    outputs = cometrt.spawn(
        lambda world: run_case(world, case, inputs, repeats),
        case.size,
        device,
        timeout_sec=timeout_sec or (60 if device == "host" else 10),
    )
    check_case(case, inputs, outputs)
    return outputs
