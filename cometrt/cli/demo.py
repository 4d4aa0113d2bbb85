"""`cometrt demo`: real text through a Mixture-of-Experts layer, checked, with its timeline.

The tokens are bytes of Python's own standard library. A fixed random table embeds each byte, and
its position is added. A softmax router chooses 8 of 128 experts for each token. Text repeats
itself, so some experts get many more tokens than others. The layer has the number of experts and
the top-k of qwen3-30b-a3b, and smaller widths.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import cometrt
from cometrt.cli.inputs import (
    check_errors,
    errors_against_reference,
    random_weights,
    standard_library,
    to_device,
    to_host,
)
from cometrt.cli.output import Say, table
from cometrt.cli.trace import check_folder, files, line_of_share, lines_of_paths, show_files
from cometrt.models import scaled_spec

if TYPE_CHECKING:
    from rich.console import Console

MODEL = "qwen3-30b-a3b"


def positions(num_tokens: int, hidden: int) -> np.ndarray:
    """[T, H]: sine and cosine of each position, as in "Attention Is All You Need", 3.5."""
    rate = 10000.0 ** (-np.arange(0, hidden, 2) / hidden)
    angle = np.arange(num_tokens)[:, None] * rate
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)


def run(world: cometrt.World, scale: int, tokens: int, out: Path, say: Say) -> dict[str, Any]:
    """Collective: a forward and a backward of a layer, checked against the reference.

    Args:
        scale: divides the model's H and I.
        tokens: bytes of text of each rank.
        out: folder for the timeline.

    Raises:
        CometError: on all ranks, if a result of any rank is wrong.
        ValueError: if `out` is a file.
    """
    check_folder(out)
    rank, size = world.rank, world.size
    spec = scaled_spec(MODEL, scale, max_tokens=tokens, capacity_factor=float(size))
    text = standard_library(size * tokens + 1)
    mine = text[rank * tokens : (rank + 1) * tokens + 1]  # and one more, to predict

    fixed = np.random.default_rng(0)  # the same on every rank
    embedding = fixed.standard_normal((256, spec.hidden))
    router = fixed.standard_normal((spec.hidden, spec.num_experts)) / np.sqrt(spec.hidden)
    x = (embedding[mine[:-1]] + positions(tokens, spec.hidden)).astype(spec.numpy_dtype)
    logits = x.astype(np.float64) @ router
    ids, topk_weights = cometrt.router.softmax_topk(logits, spec.topk)
    weights = random_weights(spec, seed=1)
    w_up, w_down = cometrt.shard_weights(*weights, rank, size, spec)

    say("making the layer; on a GPU the first time, its kernels are compiled")
    layer = cometrt.MoELayer(world, spec)
    model = to_device(world, x, ids, topk_weights, w_up, w_down)
    say("a forward and a backward")
    # Two rounds: the first warms up, the second is kept. The loss is half the squared distance
    # of y from the embedding of the next byte, so its gradient dy is their difference.
    for _ in range(2):
        world.barrier()
        with cometrt.trace.record(layer) as recording:
            begin = time.perf_counter()
            there, saved = layer.forward(*model)
            layer.synchronize()
            y = to_host(there)[0]
            dy = (y.astype(np.float32) - embedding[mine[1:]]).astype(spec.numpy_dtype)
            gradients = layer.backward(to_device(world, dy)[0], saved)
            layer.synchronize()
            grads = cometrt.Gradients(*to_host(*gradients))
            seconds = time.perf_counter() - begin
    timeline = recording.gather()
    say("the float64 reference")
    errors = errors_against_reference(world, spec, weights, (x, ids, topk_weights), dy, y, grads)
    check_errors(world, errors, spec)

    all_ids = np.concatenate(world.allgather(ids, purpose="demo"))
    own = {"seconds": seconds, "error": max(errors.values())} | _moved(all_ids, rank, size, spec)
    ranks = world.allgather(own, purpose="demo")
    load = cometrt.router.load_statistics(all_ids, spec.num_experts)
    busiest = np.argsort(-load.counts, kind="stable")[:4]
    result: dict[str, Any] = {
        "model": MODEL, "scale": scale, "hidden": spec.hidden, "intermediate": spec.intermediate,
        "experts": spec.num_experts, "topk": spec.topk, "dtype": spec.dtype, "tokens": tokens,
        "device": world.device, "mode": layer.mode, "ranks": ranks,
        "load": {
            "busiest": {int(expert): int(load.counts[expert]) for expert in busiest},
            "imbalance": load.imbalance, "variation": load.variation, "idle": load.idle,
        },
    }  # fmt: skip
    if rank == 0:
        say("drawing the timeline")
        title = f"{MODEL} / {scale}, {tokens} bytes of text on each of {size} ranks, {world.device}"
        result |= files({layer.mode: timeline}, title, out)
    world.barrier()
    return result


def _moved(all_ids: np.ndarray, rank: int, size: int, spec: cometrt.MoESpec) -> dict[str, Any]:
    """Rows of a rank, and megabytes that it pulls and pushes.

    A token crosses the link once to each other rank that has one of its experts: x in forward and
    dy in backward. Partial sums of y and dx come back, which are as large.
    """
    here = all_ids // (spec.num_experts // size) == rank
    source = np.repeat(np.arange(size), len(all_ids) // size)
    tokens = int((here.any(axis=1) & (source != rank)).sum())
    crossing = 2 * tokens * spec.hidden * spec.numpy_dtype.itemsize / 1e6
    return {"rows": int(here.sum()), "pulled_mb": crossing, "pushed_mb": crossing}


def describe(found: dict[str, Any]) -> str:
    """The layer in a line. found: what `run` returned."""
    return (
        f"{found['model']} / {found['scale']}: H={found['hidden']} I={found['intermediate']} "
        f"E={found['experts']} K={found['topk']} {found['dtype']}, {len(found['ranks'])} ranks on "
        f"{found['device']}, mode {found['mode']}"
    )


def describe_load(found: dict[str, Any]) -> str:
    """The experts' load in a line."""
    load = found["load"]
    busiest = ", ".join(f"#{expert} {count}" for expert, count in load["busiest"].items())
    return (
        f"experts' load: busiest {busiest}; {load['imbalance']:.1f}x the mean, coefficient of "
        f"variation {load['variation']:.2f}, {load['idle']} of {found['experts']} idle"
    )


CHECKED = "every result agrees with the float64 reference"


def text(found: dict[str, Any]) -> str:
    """The result without tables and colors. It needs no rich."""
    ranks = [
        f"rank {rank}: {found['tokens']} tokens, {of['rows']} rows, {of['pulled_mb']:.2f} MB "
        f"pulled, {of['pushed_mb']:.2f} MB pushed, {of['seconds'] * 1e3:.0f} ms, "
        f"largest error {of['error']:.1e}"
        for rank, of in enumerate(found["ranks"])
    ]
    lines = [
        describe(found),
        *ranks,
        describe_load(found),
        CHECKED,
        line_of_share(found),
        *lines_of_paths(found),
    ]
    return "\n".join(lines)


def show(console: Console, found: dict[str, Any]) -> None:
    rows = [
        [
            str(rank), str(found["tokens"]), str(of["rows"]), f"{of['pulled_mb']:.2f}",
            f"{of['pushed_mb']:.2f}", f"{of['seconds'] * 1e3:.0f}", f"{of['error']:.1e}",
        ]
        for rank, of in enumerate(found["ranks"])
    ]  # fmt: skip
    heads = ["rank", "tokens", "rows", "pulled MB", "pushed MB", "time ms", "largest error"]
    console.print(table(describe(found), *heads, rows=rows))
    console.print(describe_load(found), soft_wrap=True)
    console.print(f"[green]{CHECKED}[/]")
    show_files(console, found)
