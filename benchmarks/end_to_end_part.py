"""One process of benchmarks.end_to_end: it measures the stacks of one framework.

    python -m benchmarks.end_to_end_part '{...}'    the fields of Options

Of ours there is a process for each rank; of JAX's own layer one process for all GPUs. Both sides
run the same model of benchmarks.end_to_end_model. Only their MoE layers differ.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.80")  # the layer has memory of its own

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from benchmarks.end_to_end_model import DTYPE, cast, make_step, perturbed, start, update
from benchmarks.stacks import Stack
from cometrt.bench.records import spread, write

WITHOUT = "without MoE"  # the model with the identity in place of each MoE layer
LATE = "no time was left"
WARM_UP = 3


@dataclasses.dataclass(frozen=True)
class Options:
    """How a process is started.

    Args:
        stacks: fields of Stack.
        contenders: of ours "fused" and "sequential", or one of JAX's own.
        device: "host" or "cuda".
        processes, process, port: of jax.distributed; one process: without it.
        out: file of the rows, which process 0 writes as they come.
        steps: of training, whose losses are compared.
        rounds: of which the times are spread.
        sustain_sec: time of all rounds of a contender.
        limit_sec: no contender begins later.
        timeout_sec: the longest wait for another rank.
    """

    stacks: list[dict[str, Any]]
    contenders: list[str]
    device: str
    processes: int
    process: int
    port: int
    out: str
    steps: int
    rounds: int
    sustain_sec: float
    limit_sec: float
    timeout_sec: float = 120.0


def main(argv: list[str]) -> None:
    options = Options(**json.loads(argv[0]))
    begun = time.monotonic()
    start_jax(options)
    rows: list[dict[str, Any]] = []

    def add(row: dict[str, Any]) -> None:
        rows.append(row)
        if options.process == 0:
            write(Path(options.out), rows)

    for fields in options.stacks:
        stack = Stack(**fields)
        mesh = jax.sharding.Mesh(np.array(jax.devices()[: stack.ranks]), ("x",))
        for row in measure_stack(stack, mesh, options, begun):
            add({"stack": str(stack)} | row)


def start_jax(options: Options) -> None:
    if options.processes > 1:
        jax.distributed.initialize(
            f"localhost:{options.port}",
            options.processes,
            options.process,
            local_device_ids=[options.process] if options.device == "cuda" else None,
        )
    elif options.device == "host":
        jax.config.update("jax_num_cpu_devices", options.stacks[0]["ranks"])


def slowest(value: float) -> float:
    """Collective: the largest value of all processes."""
    return float(np.max(multihost_utils.process_allgather(np.float32(value))))


def measure_stack(
    stack: Stack, mesh: Any, options: Options, begun: float
) -> Iterator[dict[str, Any]]:
    """Of each contender a row with its losses, then one with its times; or a row that says why
    there is none."""

    def late() -> bool:
        return slowest(time.monotonic() - begun) > options.limit_sec

    if late():
        yield from ({"contender": name, "skipped": LATE} for name in options.contenders)
        return
    parameters, inputs = start(stack, mesh)
    calls: dict[str, Callable[[], Any]] = {}
    checks = []
    with contextlib.ExitStack() as layers:
        for contender in (WITHOUT, *options.contenders):
            if calls and late():
                yield {"contender": contender, "skipped": LATE}
                continue
            started = time.monotonic()
            moe, check = layers.enter_context(make_moe(contender, stack, mesh, options))
            checks.append(check)
            own = parameters if moe else {"shared": parameters["shared"]}
            # Compiled before any rank waits for another one.
            compiled = make_step(stack, mesh, moe).lower(own, inputs).compile()
            step = waiting(compiled) if options.device == "host" else compiled
            slowest(0)
            seconds = time.monotonic() - started
            calls[contender] = lambda step=step, own=own: step(own, inputs)
            if moe is None:
                continue
            losses = train(step, own, inputs, stack, options.steps)
            row = {"contender": contender, "compile_sec": seconds, "losses": losses}
            if contender == "fused":
                row["noisy_losses"] = train(step, perturbed(own), inputs, stack, options.steps)
            check()
            if not np.isfinite(losses).all():
                raise ValueError(f"{stack}: {contender}: losses are {losses}")
            yield row
        times = measure(calls, options)
        for check in checks:
            check()
    without = statistics.median(times.pop(WITHOUT))
    for contender, rounds in times.items():
        yield {"contender": contender, "ms": spread(rounds), "without_ms": without}


def waiting(step: Callable[..., Any]) -> Callable[..., Any]:
    """On CPU devices of one process, collectives of programs that are queued wait for threads."""
    return lambda *arguments: jax.block_until_ready(step(*arguments))


def train(step: Any, parameters: Any, inputs: Any, stack: Stack, steps: int) -> list[float]:
    """Losses of so many steps of SGD from these parameters, which stay as they are."""
    master, losses = cast(parameters, jnp.float32), []
    for _ in range(steps):
        loss, gradients = step(cast(master, DTYPE), inputs)
        master = update(master, gradients, stack)
        losses.append(loss)
    return [float(loss) for loss in jax.device_get(losses)]


def measure(calls: dict[str, Callable[[], Any]], options: Options) -> dict[str, list[float]]:
    """Collective: milliseconds of a step in each round, back to back, by the slowest rank.

    Contenders take turns.
    """
    counts = {}
    for name, call in calls.items():
        sustained(call, WARM_UP)
        ms = sustained(call, WARM_UP)
        counts[name] = max(2, math.ceil(1e3 * options.sustain_sec / options.rounds / ms))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(options.rounds):
        for name, call in calls.items():
            times[name].append(sustained(call, counts[name]))
    return times


def sustained(call: Callable[[], Any], count: int) -> float:
    """Collective: milliseconds a call, by the wall clock of the slowest rank."""
    slowest(0)
    begin = time.perf_counter()
    for _ in range(count):
        last = call()
    jax.block_until_ready(last)
    return slowest(1e3 * (time.perf_counter() - begin) / count)


# ---- MoE layers ------------------------------------------------------------------------------


@contextlib.contextmanager
def make_moe(contender: str, stack: Stack, mesh: Any, options: Options) -> Iterator[Any]:
    """(a function for make_step, a check that raises what went wrong)."""
    if contender == WITHOUT:
        yield None, lambda: None
    elif contender.startswith("jax"):
        from benchmarks.rivals_jax import differentiable
        from benchmarks.rivals_jax_mosaic import LAYERS

        layer = LAYERS[contender](stack.spec, stack.ranks, stack.tokens)
        yield differentiable(layer), lambda: None
    else:
        from cometrt.interop import jax as cometrt_jax

        with (
            cometrt_jax.connect(mesh, "x", timeout_sec=options.timeout_sec) as world,
            cometrt_jax.MoE(world, stack.spec, contender) as moe,
        ):
            yield moe, moe.check


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # at once: jax.distributed would wait for the other processes
