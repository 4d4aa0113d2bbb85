"""Measure the host's time for a fused forward or a backward, in microseconds, and its launches.

    python -m benchmarks.host_time [--pass forward,backward] [--model qwen3-30b-a3b] [--tokens 128]
                                   [--calls 200] [--out FILE]

There is one rank. Memory comes from CuPy's pool, and a backward writes into the same gradients each
time. Repeated calls have the same addresses, so they are replayed as a CUDA graph. The host waits
for the device between groups of calls, so that no call waits for room in the device's queue.
Launches are counted in a call that is not replayed.

Exits with 1 if a call is over its limits. A forward may have 6 launches and a median of 60 us, a
backward 10 launches and 80 us.
"""

from __future__ import annotations

import argparse
import functools
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import cupy as cp

import cometrt
from cometrt.bench.records import machine, spread, write
from cometrt.bench.workloads import Cell, device_normal, routing
from cometrt.models import MODELS

MOST = {"forward": (6, 60.0), "backward": (10, 80.0)}  # limits: launches, microseconds
GROUP = 20  # calls in a row
WARM_UP = 2  # groups that are not timed


def inputs_of(cell: Cell, layer: cometrt.MoELayer) -> tuple[Any, ...]:
    """Random arguments of a forward."""
    geometry, ids = layer.geometry, cp.asarray(routing(cell)[0])
    return (
        device_normal((cell.tokens, layer.spec.hidden)),
        ids,
        cp.random.random(ids.shape, dtype=cp.float32),
        device_normal(geometry.w_up_shape, layer.spec.hidden**-0.5),
        device_normal(geometry.w_down_shape, layer.spec.intermediate**-0.5),
    )


class Timed(NamedTuple):
    """A call whose host time is measured, and its preparation, which is not."""

    name: str  # in the file
    call: Callable[[Any], Any]  # takes what `prepare` returned
    prepare: Callable[[], Any] = lambda: None


def timed_calls(layer: cometrt.MoELayer, inputs: tuple[Any, ...], which: str) -> list[Timed]:
    """The calls that are timed for a pass, "forward" or "backward"."""
    if which == "forward":
        return [
            Timed(name, functools.partial(_forward, layer, inputs, training))
            for name, training in (("training", True), ("inference", False))
        ]
    x, _, *given = inputs
    dy, grads = device_normal(x.shape), cometrt.Gradients(*map(cp.empty_like, (x, *given)))

    def saved() -> Any:
        return layer.forward(*inputs, training=True)[1]

    return [Timed("backward", lambda kept: layer.backward(dy, kept, out=grads), saved)]


def _forward(layer: cometrt.MoELayer, inputs: tuple[Any, ...], training: bool, _: Any) -> Any:
    return layer.forward(*inputs, training=training)


def launches_of(layer: cometrt.MoELayer, timed: Timed) -> int:
    """Number of launches of one call that is not replayed."""
    executor, count = layer.executor, 0
    kernels = dict(executor.kernels)

    def counted(kernel: Any) -> Any:
        def launch(stream: int, *args: Any) -> None:
            nonlocal count
            count += 1
            kernel(stream, *args)

        return launch

    given = timed.prepare()
    executor.kernels |= {name: counted(kernel) for name, kernel in kernels.items()}
    executor.graphs.enabled = False
    try:
        timed.call(given)
    finally:
        executor.kernels |= kernels
        executor.graphs.enabled = True
    return count


def times_us(timed: Timed, layer: cometrt.MoELayer, calls: int) -> list[float]:
    """Microseconds of the host in each of at least `calls` calls."""
    times = []
    for group in range(WARM_UP + -(-calls // GROUP)):
        for _ in range(GROUP):
            given = timed.prepare()
            begin = time.perf_counter_ns()
            result = timed.call(given)
            end = time.perf_counter_ns()
            del result, given  # their memory serves the next call; freeing is not part of this one
            if group >= WARM_UP:
                times.append((end - begin) / 1000)
        layer.synchronize()
    return times


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pass", dest="passes", default="forward", metavar=",".join(MOST))
    parser.add_argument("--model", choices=list(MODELS), default="qwen3-30b-a3b")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--calls", type=int, default=200)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    args.passes = args.passes.split(",")
    if unknown := [name for name in args.passes if name not in MOST]:
        parser.error(f"{unknown} not among {', '.join(MOST)}")
    return args


def main() -> None:
    args = parse()
    cell = Cell(args.model, ranks=1, tokens=args.tokens)
    found: dict[str, Any] = {"machine": machine(), "model": args.model, "tokens": args.tokens}

    def fn(world: cometrt.World) -> bool:
        layer, good = cometrt.MoELayer(world, cell.spec, "fused"), True
        inputs = inputs_of(cell, layer)
        for which in args.passes:
            most_launches, most_us = MOST[which]
            for timed in timed_calls(layer, inputs, which):
                launches = launches_of(layer, timed)
                gc.collect()
                gc.disable()
                times = sorted(times_us(timed, layer, args.calls))
                gc.enable()
                median = statistics.median(times)
                good &= launches <= most_launches and median <= most_us
                found[timed.name] = {
                    "launches": launches, "us": spread(times), "least_us": times[0],
                }  # fmt: skip
                print(
                    f"{args.model} T={args.tokens} {timed.name}: {launches} launches, "
                    f"median {median:.1f} us, p90 {times[len(times) * 9 // 10]:.1f} us, "
                    f"least {times[0]:.1f} us of {len(times)} calls"
                )
        layer.close()
        return good

    good = all(cometrt.spawn(fn, 1, "cuda"))
    write(args.out, found)
    if not good:
        limits = [f"{which}: {us:.0f} us, {n} launches" for which, (n, us) in MOST.items()]
        raise SystemExit(f"over the limits ({'; '.join(limits)})")


if __name__ == "__main__":
    main()
