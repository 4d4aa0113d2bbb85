"""Measure what a fused forward costs the host: microseconds of a call, and its launches.

python benchmarks/host_time.py [--model qwen3-30b-a3b] [--tokens 128] [--calls 200] [--out r.json]

One rank, memory from the pool, nothing waited for within a call; between groups of calls the device
catches up, so that no call waits for room in its queue. Calls come again with the same memory, and
so are replays; launches are counted in the first. Exits with 1 where the median is over 60 us, or a
call is more than six launches.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cupy as cp
import numpy as np

import cometrt
from benchmarks.files import machine, write
from benchmarks.layer_cells import spread
from cometrt.kernels.launch import Kernel
from cometrt.models import MODELS

MOST_LAUNCHES, MOST_US = 6, 60.0
GROUP = 20  # calls in a row
WARM_UP = 2  # groups


def inputs_of(spec: cometrt.MoESpec) -> tuple[Any, ...]:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((spec.max_tokens, spec.hidden)).astype(spec.numpy_dtype)
    ids = np.argsort(rng.random((spec.max_tokens, spec.num_experts)), axis=1)[:, : spec.topk]
    weights = rng.random(ids.shape, np.float32)
    parts = 2 if spec.gated else 1
    w_up = cp.zeros((spec.num_experts, parts * spec.intermediate, spec.hidden), spec.numpy_dtype)
    w_down = cp.zeros((spec.num_experts, spec.hidden, spec.intermediate), spec.numpy_dtype)
    return cp.asarray(x), cp.asarray(ids.astype(np.int32)), cp.asarray(weights), w_up, w_down


def launches_of(forward: Any) -> int:
    real, count = Kernel.__call__, 0

    def counted(self: Kernel, *args: Any, **more: Any) -> None:
        nonlocal count
        count += 1
        real(self, *args, **more)

    Kernel.__call__ = counted  # type: ignore[method-assign]
    try:
        forward()
    finally:
        Kernel.__call__ = real  # type: ignore[method-assign]
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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=list(MODELS), default="qwen3-30b-a3b")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--calls", type=int, default=200)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    model = MODELS[args.model]
    spec = cometrt.MoESpec(
        hidden=model.hidden,
        intermediate=model.intermediate,
        num_experts=model.num_experts,
        topk=model.topk,
        max_tokens=args.tokens,
        capacity_factor=1.0,  # one rank: every routing fits
    )

    found: dict[str, Any] = {"machine": machine(), "model": args.model, "tokens": args.tokens}

    def fn(world: cometrt.World) -> bool:
        inputs, good = inputs_of(spec), True
        layer = cometrt.MoELayer(world, spec, "fused")
        for training in (True, False):

            def forward(training: bool = training) -> Any:
                return layer.forward(*inputs, training=training)

            launches = launches_of(forward)
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
    if args.out:
        write(args.out, found)
    if not good:
        raise SystemExit(f"over {MOST_US:.0f} us or {MOST_LAUNCHES} launches")


if __name__ == "__main__":
    main()
