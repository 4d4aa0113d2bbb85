"""`cometrt bench`: the times of a model's layer on this machine, beside other ways to do it."""

from __future__ import annotations

import argparse
import math
import platform
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console

import cometrt
from cometrt.bench.records import figures, spread, tflops
from cometrt.bench.workloads import PASSES, SHAPES, Cell
from cometrt.cli.inputs import random_inputs
from cometrt.cli.output import Say, table
from cometrt.cli.ranks import Processes, Threads
from cometrt.models import scaled_spec
from cometrt.specs import check_choice

CONTENDERS = ["fused", "sequential", "nccl", "gemms"]
TEXTS = {
    "fused": "fused",
    "sequential": "sequential",
    "nccl": "NCCL around our GEMMs",
    "gemms": "GEMMs alone, no exchange",
}
HOST_SCALE = 16  # divides H and I on the host, which is not made for speed


def run(
    ranks: Threads | Processes,
    device: str,
    model: str,
    tokens: int,
    tp: int,
    rounds: int,
    seconds: float,
    say: Say,
) -> dict[str, Any]:
    """On all ranks: check a layer, and measure its passes.

    Args:
        rounds: isolated calls of each contender and pass.
        seconds: how long sustained calls of each go on; 0: they are not measured.

    Returns:
        facts, and entries of `cometrt.bench.records` by pass; on rank 0.
    """
    facts = {"model": model, "tokens": tokens, "tp": tp, "ranks": ranks.size, "device": device}
    if device == "host":
        spec = scaled_spec(model, HOST_SCALE, max_tokens=tokens, tp=tp)
        passes = ranks.run(lambda world: on_host(world, spec, rounds, seconds, say), device)
        machine = {"cpu": platform.processor() or platform.machine()}
        return facts | {"scale": HOST_SCALE, "machine": machine, "passes": passes}

    from cometrt.bench.contenders import measure_cell
    from cometrt.bench.records import machine as this_machine

    check_choice("model", model, tuple(SHAPES))
    cell = Cell(model, ranks.size, tp, tokens)
    args = argparse.Namespace(
        passes=list(PASSES), contenders=CONTENDERS, inference=False, rounds=rounds, idle_ms=20.0,
        sustain_sec=seconds,
    )  # fmt: skip

    def measured(world: cometrt.World) -> dict[str, Any]:
        return measure_cell(world, cell, args, say=say if world.rank == 0 else lambda text: None)

    passes = ranks.run(measured, device)
    return facts | {"scale": 1, "machine": this_machine(), "passes": passes}


def on_host(
    world: cometrt.World, spec: cometrt.MoESpec, rounds: int, seconds: float, say: Say
) -> dict[str, Any]:
    """Collective: as `measure_cell`, of the host's two modes, by the host's clock."""
    layers = {mode: cometrt.MoELayer(world, spec, mode) for mode in ("fused", "sequential")}
    inputs, dy = random_inputs(layers["fused"], spec.max_tokens)
    found: dict[str, Any] = {}
    for which, flops in PASSES.items():
        if world.rank == 0:
            say(f"measuring {which}")
        work = flops * spec.max_tokens * spec.topk * spec.hidden * spec.intermediate
        entry: dict[str, Any] = {"flops": float(work), "link_ms": 0.0, "times": {}}
        calls = {mode: _host_call(layer, which, inputs, dy) for mode, layer in layers.items()}
        isolated: dict[str, list[float]] = {mode: [] for mode in calls}
        for index in range(-1, rounds):  # the first warms up
            for mode in random.Random(index).sample(list(calls), len(calls)):
                world.barrier()
                ms = max(world.allgather(calls[mode](1), purpose="bench"))
                isolated[mode] += [ms] if index >= 0 else []
        for mode, times in isolated.items():
            entry["times"][mode] = {"isolated": spread(times)}
            if seconds:
                count = max(3, math.ceil(1e3 * seconds / statistics.median(times)))
                world.barrier()
                mean = calls[mode](count) / count
                entry["times"][mode]["sustained"] = max(world.allgather(mean, purpose="bench"))
        found[which] = entry
    return found


def _host_call(
    layer: cometrt.MoELayer, which: str, inputs: tuple[Any, ...], dy: Any
) -> Callable[[int], float]:
    """A function that makes so many calls, and returns the milliseconds of the timed parts."""

    def run(count: int) -> float:
        total = 0.0
        for _ in range(count):
            begin = time.perf_counter()
            _, saved = layer.forward(*inputs)
            if which == "backward":
                begin = time.perf_counter()
            if which != "forward":
                layer.backward(dy, saved)
            total += time.perf_counter() - begin
        return 1e3 * total

    return run


# ---- the tables --------------------------------------------------------------------------------


def show(console: Console, found: dict[str, Any]) -> None:
    scaled = "" if found["scale"] == 1 else f" / {found['scale']}"
    console.print(
        f"[bold]{found['model']}{scaled}[/], {found['tokens']} tokens on each of {found['ranks']} "
        f"ranks, TP={found['tp']}, {', '.join(map(str, found['machine'].values()))}",
        soft_wrap=True,
    )
    on_gpu = found["device"] == "cuda"
    for which, entry in found["passes"].items():
        rows = [_row(entry, name, on_gpu) for name in entry["times"]]
        heads = ["isolated ms", "p90", "sustained ms"]
        heads += ["TFLOP/s", "sustained"] if on_gpu else []
        console.print(table(which, "", *heads, rows=rows))
        ratios = figures(entry)
        if "over nccl" in ratios:
            console.print(f"NCCL's form takes {ratios['over nccl']:.2f} times as long as fused")
    if on_gpu and "nccl" not in found["passes"]["forward"]["times"]:
        console.print("NCCL: not installed, or ranks share a GPU, which it refuses")
    if not on_gpu:
        console.print("The host mode is for tests and learning. It is not fast.")


def _row(entry: dict[str, Any], name: str, on_gpu: bool) -> list[str]:
    """Times are of the slowest rank, FLOP/s of each GPU."""
    times = entry["times"][name]
    isolated, sustained = times["isolated"], times.get("sustained")
    row = [TEXTS.get(name, name), f"{isolated['median']:.3f}", f"{isolated['p90']:.3f}"]
    row.append(f"{sustained:.3f}" if sustained else "")
    if on_gpu:
        rates = [tflops(entry, name, sustained=which) for which in (False, True)]
        row += ["" if rate is None else f"{rate:.0f}" for rate in rates]
    return row
