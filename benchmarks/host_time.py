"""Measure the host's time for a forward, a backward and both, in microseconds, and their launches.

    python -m benchmarks.host_time [--mode fused,sequential] [--pass forward,backward,both]
                                   [--model qwen3-30b-a3b] [--tokens 128] [--calls 200] [--out FILE]

There is one rank. Memory comes from CuPy's pool, and a backward writes into the same gradients each
time. Repeated calls have the same addresses, so they are replayed as a CUDA graph, but for a
sequential forward. The host waits for the device between groups of calls, so that no call waits for
room in the device's queue. Launches are counted in a call that is not replayed.

The file has, by mode and call ("training" and "inference" are forwards), the launches, the median,
p10 and p90, and the least time.

Exits with 1 if a call of mode "fused" is over its limits. A forward may have 6 launches and a
median of 60 us, a backward 10 launches and 80 us, and both together 16 launches and 140 us.
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

MOST = {  # limits: launches, microseconds
    "forward": (6, 60.0),
    "backward": (10, 80.0),
    "both": (16, 140.0),
}
LIMITED, MODES = "fused", ("fused", "sequential")
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
    """The calls that are timed for one of MOST."""
    if which == "forward":
        return [
            Timed(name, functools.partial(_forward, layer, inputs, training))
            for name, training in (("training", True), ("inference", False))
        ]
    x, _, *given = inputs
    dy, grads = device_normal(x.shape), cometrt.Gradients(*map(cp.empty_like, (x, *given)))

    def saved() -> Any:
        return layer.forward(*inputs, training=True)[1]

    def both(_: Any) -> Any:
        return layer.backward(dy, saved(), out=grads)

    if which == "both":
        return [Timed("both", both)]
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
    parser.add_argument("--mode", dest="modes", default=",".join(MODES), metavar=",".join(MODES))
    parser.add_argument("--pass", dest="passes", default=",".join(MOST), metavar=",".join(MOST))
    parser.add_argument("--model", choices=list(MODELS), default="qwen3-30b-a3b")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--calls", type=int, default=200)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    args.modes, args.passes = args.modes.split(","), args.passes.split(",")
    for names, known in ((args.modes, MODES), (args.passes, tuple(MOST))):
        if unknown := [name for name in names if name not in known]:
            parser.error(f"{unknown} not among {', '.join(known)}")
    return args


def measure(
    layer: cometrt.MoELayer, cell: Cell, passes: list[str], calls: int
) -> tuple[dict[str, Any], bool]:
    """What the file has of a layer, by call, and whether all calls are within their limits."""
    inputs, found, good = inputs_of(cell, layer), {}, True
    for which in passes:
        most_launches, most_us = MOST[which]
        for timed in timed_calls(layer, inputs, which):
            launches = launches_of(layer, timed)
            gc.collect()
            gc.disable()
            times = sorted(times_us(timed, layer, calls))
            gc.enable()
            median = statistics.median(times)
            good &= launches <= most_launches and median <= most_us
            found[timed.name] = {"launches": launches, "us": spread(times), "least_us": times[0]}
            print(
                f"{cell.model} T={cell.tokens} {layer.mode} {timed.name}: {launches} launches, "
                f"median {median:.1f} us, p90 {times[len(times) * 9 // 10]:.1f} us, "
                f"least {times[0]:.1f} us of {len(times)} calls"
            )
    return found, good


def main() -> None:
    args = parse()
    cell = Cell(args.model, ranks=1, tokens=args.tokens)
    modes: dict[str, Any] = {}

    def fn(world: cometrt.World) -> bool:
        good = True
        for mode in args.modes:
            layer = cometrt.MoELayer(world, cell.spec, mode)
            modes[mode], within = measure(layer, cell, args.passes, args.calls)
            good &= within or mode != LIMITED
            layer.close()
        return good

    good = all(cometrt.spawn(fn, 1, "cuda"))
    found = {"machine": machine(), "model": args.model, "tokens": args.tokens, "modes": modes}
    write(args.out, found)
    if not good:
        limits = [f"{which}: {us:.0f} us, {n} launches" for which, (n, us) in MOST.items()]
        raise SystemExit(f"mode {LIMITED!r} is over the limits ({'; '.join(limits)})")


if __name__ == "__main__":
    main()
