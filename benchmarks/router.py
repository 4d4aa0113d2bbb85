"""Measure routers and their losses on one GPU, in microseconds per call.

    python -m benchmarks.router [--tokens 8192] [--experts 256] [--topk 8] [--out FILE]

"device" is the mean time of a call in a CUDA graph of many, which leaves out the host's time.
"host" is the time until a call returns. The router of DeepSeek-V3 (sigmoid, bias, 4 of 8 groups)
has limits for 8,192 tokens, 256 experts and topk 8: 40 us forward and 60 us backward. Exits with 1
if its median is over a limit.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cupy as cp

from cometrt import router
from cometrt.bench.records import machine, spread, write

CALLS = 20  # in a graph
LIMITS = {"sigmoid, groups": {"forward": 40.0, "backward": 60.0}}
LIMITED = (8192, 256, 8)  # tokens, experts, topk
GROUPS = {"num_groups": 8, "topk_groups": 4}


def device_us(call: Callable[[], Any], rounds: int) -> list[float]:
    """Microseconds per call of a graph of CALLS calls, in each round."""
    times = []
    with cp.cuda.Stream(non_blocking=True) as stream:
        call()  # kernels are loaded, and memory lies in the pool
        stream.synchronize()
        stream.begin_capture()
        for _ in range(CALLS):
            call()
        graph = stream.end_capture()
        for index in range(rounds + 2):
            begin, end = cp.cuda.Event(), cp.cuda.Event()
            begin.record()
            graph.launch(stream)
            end.record()
            end.synchronize()
            if index >= 2:
                times.append(1e3 * cp.cuda.get_elapsed_time(begin, end) / CALLS)
    return times


def host_us(call: Callable[[], Any], rounds: int) -> list[float]:
    """Microseconds until a call returns, in each round. Between rounds the host synchronises."""
    times = []
    for _ in range(rounds):
        begin = time.perf_counter_ns()
        for _ in range(CALLS):
            call()
        times.append((time.perf_counter_ns() - begin) / 1000 / CALLS)
        cp.cuda.get_current_stream().synchronize()
    return times


def calls_of(tokens: int, experts: int, topk: int) -> dict[str, dict[str, Callable[[], Any]]]:
    """Calls by name of the router or loss, then by "forward" and "backward"."""
    logits = cp.random.standard_normal((tokens, experts), dtype=cp.float32)
    bias = 0.01 * cp.random.standard_normal(experts, dtype=cp.float32)
    calls: dict[str, dict[str, Callable[[], Any]]] = {}

    def add(name: str, kind: str, **keywords: Any) -> None:
        choose = getattr(router, f"{kind}_topk")
        backward = getattr(router, f"{kind}_topk_backward")
        ids, weights = choose(logits, topk, **keywords)
        calls[name] = {
            "forward": lambda: choose(logits, topk, **keywords),
            "backward": lambda: backward(weights, logits, ids, **keywords),
        }

    add("softmax", "softmax")
    add("softmax, all experts", "softmax", renormalize=False)
    add("sigmoid", "sigmoid", bias=bias)
    if experts % 8 == 0 and topk <= experts // 2:
        add("softmax, groups", "softmax", **GROUPS)
        add("sigmoid, groups", "sigmoid", bias=bias, scale=2.5, **GROUPS)
        add("sqrt_softplus, groups", "sqrt_softplus", bias=bias, **GROUPS)
    ids = router.softmax_topk(logits, topk).ids
    calls["weights of ids"] = {"forward": lambda: router.softmax_weights(logits, ids)}
    calls["balance_loss"] = {
        "forward": lambda: router.balance_loss(logits, ids),
        "backward": lambda: router.balance_loss_backward(0.01, logits, ids),
    }
    calls["z_loss"] = {
        "forward": lambda: router.z_loss(logits),
        "backward": lambda: router.z_loss_backward(0.001, logits),
    }
    calls["load_statistics"] = {"forward": lambda: router.load_statistics(ids, experts)}
    counts = router.load_statistics(ids, experts).counts
    calls["update_bias"] = {"forward": lambda: router.update_bias(bias, counts)}
    return calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=LIMITED[0])
    parser.add_argument("--experts", type=int, default=LIMITED[1])
    parser.add_argument("--topk", type=int, default=LIMITED[2])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    shape = (args.tokens, args.experts, args.topk)
    print("T = {}, E = {}, K = {}: microseconds, device / host".format(*shape))
    found: dict[str, Any] = {"machine": machine(), "shape": shape, "us": {}}
    too_slow = []
    for name, directions in calls_of(*shape).items():
        parts = []
        for direction, call in directions.items():
            on_device, on_host = device_us(call, args.rounds), host_us(call, args.rounds)
            found["us"][f"{name}, {direction}"] = {
                "device": spread(on_device),
                "host": spread(on_host),
            }
            median = statistics.median(on_device)
            parts.append(f"{direction} {median:6.1f} / {statistics.median(on_host):6.1f}")
            limit = LIMITS.get(name, {}).get(direction)
            if shape == LIMITED and limit and median > limit:
                too_slow.append(f"{name}, {direction}: {median:.1f} us > {limit:.0f} us")
        print(f"{name:24s} {'   '.join(parts)}", flush=True)
    write(args.out, found)
    if too_slow:
        sys.exit("\n".join(too_slow))


if __name__ == "__main__":
    main()
