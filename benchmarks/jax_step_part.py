"""One process of benchmarks.jax_step, which is one rank.

python -m benchmarks.jax_step_part '{...}'    the fields of Options
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.50")  # the other half is for CuPy

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

import cometrt
from benchmarks.stacks import SHAPES
from cometrt.bench.records import spread, write
from cometrt.bench.workloads import CAPACITY_FACTOR
from cometrt.interop import jax as cometrt_jax

SHARDED = PartitionSpec("expert")
# Instructions of XLA that run nothing, or are the calls themselves.
QUIET = {"parameter", "get-tuple-element", "tuple", "constant", "bitcast", "custom-call"}


@dataclasses.dataclass(frozen=True)
class Options:
    """How a process is started.

    Args:
        model, tokens, layers: of a step.
        warm_up: steps before the first round.
        steps: of a round.
        rounds: of which the times are spread.
        device: "host" or "cuda".
        processes, process, port: of jax.distributed; one process: without it.
        out: file of the row, which process 0 writes.
    """

    model: str
    tokens: int
    layers: int
    warm_up: int
    steps: int
    rounds: int
    device: str
    processes: int
    process: int
    port: int
    out: str


@dataclasses.dataclass
class Side:
    """JAX, or the calls.

    Attributes:
        run: queues a step; its results must live until the next one is queued.
        wait: until what is queued has ended.
        layer: whose calls a step makes.
    """

    run: Callable[[], Any]
    wait: Callable[[Any], Any]
    layer: cometrt.MoELayer


def main(argv: list[str]) -> None:
    options = Options(**json.loads(argv[0]))
    start_jax(options)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[: options.processes]), ("expert",))
    with cometrt_jax.connect(mesh, timeout_sec=120) as world:
        row = measure(options, world, mesh)
    if options.process == 0:
        write(Path(options.out), row)


def start_jax(options: Options) -> None:
    if options.device == "host":
        jax.config.update("jax_num_cpu_devices", 1)
        jax.config.update("jax_platforms", "cpu")
    if options.processes > 1:
        jax.distributed.initialize(
            f"localhost:{options.port}",
            options.processes,
            options.process,
            local_device_ids=[options.process] if options.device == "cuda" else None,
        )
    elif options.device == "cuda":
        jax.config.update("jax_cuda_visible_devices", "0")


def measure(options: Options, world: cometrt_jax.JaxWorld, mesh: Any) -> dict[str, Any]:
    model, (own,) = SHAPES[options.model], world.ranks.values()
    spec = cometrt.MoESpec(
        model.hidden,
        model.intermediate,
        model.num_experts,
        model.topk,
        max_tokens=options.tokens,
        capacity_factor=CAPACITY_FACTOR if options.tokens >= 1024 else float(model.num_experts),
    )
    arrays = jax.block_until_ready(arrays_of(spec, options, mesh))
    with cometrt_jax.MoE(world, spec) as moe:
        (of_jax,) = moe.layers.values()
        on_gpu = of_jax.on_gpu  # JAX may change the thread's GPU
        with on_gpu():
            layer = cometrt.MoELayer(own, spec)
            run = calls_of(layer, arrays, options)

        def run_calls() -> Any:
            with on_gpu():
                return run()

        def wait_for_calls(_: Any) -> None:
            with on_gpu():
                layer.synchronize()

        step = step_of(moe, options.layers, mesh).lower(*arrays).compile()
        sides = {
            "JAX": Side(lambda: step(*arrays), jax.block_until_ready, of_jax),
            "calls": Side(run_calls, wait_for_calls, layer),
        }
        check_equal(*(side.run() for side in sides.values()))
        times = timed(sides, own, options)
        for name, side in sides.items():
            if options.device == "cuda":
                times[name]["watched"] |= watched(side, own, options)
        moe.check()
        with on_gpu():
            layer.close()
    ms = {name: entry["us"]["median"] for name, entry in times.items()}
    return {
        "jax": jax.__version__,
        "layer": dataclasses.asdict(options) | {"out": "", "process": 0, "port": 0},
        "times": times,
        "overhead_percent": 100 * (ms["JAX"] / ms["calls"] - 1),
        "others": others(step.as_text()),
    }


def arrays_of(spec: cometrt.MoESpec, options: Options, mesh: Any) -> tuple[jax.Array, ...]:
    """dy, x, ids, weights of all tokens, w_up, w_down of all experts: sharded, and random."""
    sharding, count = NamedSharding(mesh, SHARDED), options.tokens * options.processes
    dtype, keys = jnp.dtype(spec.numpy_dtype), jax.random.split(jax.random.key(0), 5)
    w_up = (spec.num_experts, 2 * spec.intermediate, spec.hidden)
    w_down = (spec.num_experts, spec.hidden, spec.intermediate)

    def make() -> tuple[jax.Array, ...]:
        weights, ids = jax.lax.top_k(
            jax.random.uniform(keys[0], (count, spec.num_experts)), spec.topk
        )
        scale = spec.hidden**-0.5
        return (
            jax.random.normal(keys[1], (count, spec.hidden), dtype),
            jax.random.normal(keys[2], (count, spec.hidden), dtype),
            ids.astype(jnp.int32),
            weights / weights.sum(-1, keepdims=True),
            jax.random.normal(keys[3], w_up, dtype) * dtype.type(scale),
            jax.random.normal(keys[4], w_down, dtype) * dtype.type(scale),
        )

    return jax.jit(make, out_shardings=sharding)()


def step_of(moe: cometrt_jax.MoE, num_layers: int, mesh: Any) -> Any:
    """(dy, x, ids, weights, w_up, w_down) -> y, dx, dweights, and each layer's dw_up and dw_down.
    All layers have the same weights."""

    def step(dy: Any, x: Any, ids: Any, weights: Any, w_up: Any, w_down: Any) -> Any:
        def model(x: Any, weights: Any, layers: Any) -> Any:
            for own in layers:
                x = moe(x, ids, weights, *own)
            return x

        y, backward = jax.vjp(model, x, weights, [(w_up, w_down)] * num_layers)
        return [y, *jax.tree.leaves(backward(dy))]

    return jax.jit(jax.shard_map(step, mesh=mesh, in_specs=SHARDED, out_specs=SHARDED))


def calls_of(layer: cometrt.MoELayer, arrays: Any, options: Options) -> Callable[[], Any]:
    """The same results by calls of the layer. Gradients of router weights are of the first layer
    only where there are several: JAX adds them."""

    def own(array: Any) -> Any:
        (shard,) = array.addressable_shards
        if options.device == "host":
            return np.asarray(shard.data)
        import cupy

        return cupy.from_dlpack(shard.data)

    dy, x, ids, weights, *experts = map(own, arrays)

    def run() -> Any:
        y, saved = x, []
        for _ in range(options.layers):
            y, kept = layer.forward(y, ids, weights, *experts)
            saved.append(kept)
        dx, of_experts = dy, list[Any]()
        while saved:
            dx, dweights, *found = layer.backward(dx, saved.pop())
            of_experts = found + of_experts
        return [y, dx, dweights, *of_experts]

    return run


def check_equal(in_jax: list[Any], in_calls: list[Any]) -> None:
    """Raise a ValueError unless both sides have made the same y."""
    (shard,) = in_jax[0].addressable_shards
    ours, theirs = np.asarray(shard.data), in_calls[0]
    theirs = theirs.get() if hasattr(theirs, "get") else theirs
    if ours.tobytes() != theirs.tobytes() or not np.isfinite(ours.astype(np.float32)).all():
        raise ValueError("y in JAX must have the bits of the layer's calls, and be finite")


def timed(
    sides: dict[str, Side], world: cometrt.World, options: Options
) -> dict[str, dict[str, Any]]:
    """Collective: microseconds of a step in each round, where the sides take turns, and of the
    host until a step is queued; and the graphs of those rounds."""
    for side in sides.values():
        round_of(side, world, options.warm_up)
    before = {name: graphs_of(side) for name, side in sides.items()}
    rounds: dict[str, list[float]] = {name: [] for name in sides}
    dispatch: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(options.rounds):
        for name, side in sides.items():
            us, queued = round_of(side, world, options.steps)
            rounds[name].append(us)
            dispatch[name] += queued
    return {
        name: {
            "us": spread(rounds[name]),
            "rounds_us": rounds[name],
            "dispatch_us": statistics.median(dispatch[name]),
            "watched": {key: value - before[name][key] for key, value in graphs_of(side).items()},
        }
        for name, side in sides.items()
    }


def round_of(side: Side, world: cometrt.World, steps: int) -> tuple[float, list[float]]:
    """Collective: microseconds of a step by the slowest rank, and of each dispatch on this one."""
    world.barrier()
    last, queued, begin = None, [], time.perf_counter_ns()
    for _ in range(steps):
        started = time.perf_counter_ns()
        last = side.run()
        queued.append((time.perf_counter_ns() - started) / 1e3)
    side.wait(last)
    us = (time.perf_counter_ns() - begin) / 1e3 / steps
    return max(world.allgather(us)), queued


def graphs_of(side: Side) -> dict[str, int]:
    graphs = getattr(side.layer.executor, "graphs", None)
    if graphs is None:
        return {}
    return {"graphs made": graphs.num_made, "calls without a graph": graphs.num_launched}


def watched(side: Side, world: cometrt.World, options: Options) -> dict[str, float]:
    """Collective: medians of one more round, in microseconds, by CUDA events at the begin and the
    end of each call. Where the device is idle, a call's device time begins with its host time."""
    import cupy as cp

    executor, events, host = side.layer.executor, list[tuple[Any, Any]](), list[float]()
    idle, queue = list[bool](), executor.enqueue

    def enqueue(*arguments: Any) -> None:
        begin, end = cp.cuda.Event(), cp.cuda.Event()
        if events:
            idle.append(bool(events[-1][1].done))
        begin.record()
        started = time.perf_counter_ns()
        queue(*arguments)
        host.append((time.perf_counter_ns() - started) / 1e3)
        end.record()
        events.append((begin, end))

    executor.enqueue = enqueue  # type: ignore[method-assign]
    try:
        round_of(side, world, options.steps)
    finally:
        executor.enqueue = queue  # type: ignore[method-assign]
    events[-1][1].synchronize()
    calls = 2 * options.layers  # of a step
    within = [1e3 * cp.cuda.get_elapsed_time(*pair) for pair in events]
    gaps = [1e3 * cp.cuda.get_elapsed_time(a[1], b[0]) for a, b in itertools.pairwise(events)]

    def median(values: list[float], which: Callable[[int], bool]) -> float:
        """Of those whose number in its step is such."""
        return statistics.median(value for n, value in enumerate(values) if which(n % calls))

    return {
        "forward us": median(within, lambda n: n < options.layers),
        "backward us": median(within, lambda n: n >= options.layers),
        "between calls us": median(gaps, lambda n: n < calls - 1),
        "between steps us": median(gaps, lambda n: n == calls - 1),
        "host of a call us": statistics.median(host),
        "idle": statistics.mean(idle),
    }


def others(text: str) -> list[str]:
    """Instructions of a compiled program's entry that run something besides the calls."""
    entry = text[text.index("ENTRY") :]
    found = re.findall(r"= (\(?[a-z0-9]+\[[^ ]*).* ([a-z][a-z0-9-]*)\(", entry)
    return [f"{opcode} {shape}" for shape, opcode in found if opcode not in QUIET]


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # at once: jax.distributed would wait for the other processes
