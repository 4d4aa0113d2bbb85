"""Measure the host's time for a fused forward, in microseconds, and its launches.

    python -m benchmarks.host_time [--model qwen3-30b-a3b] [--tokens 128] [--calls 200] [--out FILE]

One rank, memory from the pool. Nothing waits within a call, and between groups of calls the device
catches up, so that no call waits for room in its queue. Repeated calls have the same memory: they
are replayed as a graph. Launches are counted in a call that is not. Exits with 1 where the median
is over 60 us, or a call has more than six launches.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cupy as cp

import cometrt
from benchmarks.records import machine, spread, write
from benchmarks.workloads import Cell, device_normal, routing
from cometrt.models import MODELS

MOST_LAUNCHES, MOST_US = 6, 60.0
GROUP = 20  # calls in a row
WARM_UP = 2  # groups


def inputs_of(cell: Cell, layer: cometrt.MoELayer) -> tuple[Any, ...]:
    geometry, ids = layer.geometry, cp.asarray(routing(cell)[0])
    return (
        device_normal((cell.tokens, layer.spec.hidden)),
        ids,
        cp.random.random(ids.shape, dtype=cp.float32),
        device_normal(geometry.w_up_shape, layer.spec.hidden**-0.5),
        device_normal(geometry.w_down_shape, layer.spec.intermediate**-0.5),
    )


def launches_of(layer: cometrt.MoELayer, forward: Callable[[], Any]) -> int:
    """Of one forward that is not replayed."""
    executor, count = layer.executor, 0
    kernels = dict(executor.kernels)

    def counted(kernel: Any) -> Any:
        def launch(stream: int, *args: Any) -> None:
            nonlocal count
            count += 1
            kernel(stream, *args)

        return launch

    executor.kernels |= {name: counted(kernel) for name, kernel in kernels.items()}
    executor.graphs.enabled = False
    try:
        forward()
    finally:
        executor.kernels |= kernels
        executor.graphs.enabled = True
    return count


def times_us(forward: Any, layer: cometrt.MoELayer, calls: int) -> list[float]:
    times = []
    for group in range(WARM_UP + -(-calls // GROUP)):
        for _ in range(GROUP):
            begin = time.perf_counter_ns()
            result = forward()
            end = time.perf_counter_ns()
            del result  # its memory serves the next call; freeing is not part of this one
            if group >= WARM_UP:
                times.append((end - begin) / 1000)
        layer.synchronize()
    return times


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=list(MODELS), default="qwen3-30b-a3b")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--calls", type=int, default=200)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    cell = Cell(args.model, ranks=1, tokens=args.tokens)
    found: dict[str, Any] = {"machine": machine(), "model": args.model, "tokens": args.tokens}

    def fn(world: cometrt.World) -> bool:
        layer, good = cometrt.MoELayer(world, cell.spec, "fused"), True
        inputs = inputs_of(cell, layer)
        for training in (True, False):

            def forward(training: bool = training) -> Any:
                return layer.forward(*inputs, training=training)

            launches = launches_of(layer, forward)
            gc.collect()
            gc.disable()
            times = sorted(times_us(forward, layer, args.calls))
            gc.enable()
            median = statistics.median(times)
            good &= launches <= MOST_LAUNCHES and median <= MOST_US
            kind = "training" if training else "inference"
            found[kind] = {"launches": launches, "us": spread(times), "least_us": times[0]}
            print(
                f"{args.model} T={args.tokens} training={training}: {launches} launches, "
                f"median {median:.1f} us, p90 {times[len(times) * 9 // 10]:.1f} us, "
                f"least {times[0]:.1f} us of {len(times)} calls"
            )
        layer.close()
        return good

    good = all(cometrt.spawn(fn, 1, "cuda"))
    write(args.out, found)
    if not good:
        raise SystemExit(f"over {MOST_US:.0f} us or {MOST_LAUNCHES} launches")


if __name__ == "__main__":
    main()
