"""Measure how long small batches take in inference: the 50th and the 99th percentile of a forward.

    python -m benchmarks.latency [--ranks 4] [options]       a thread for each rank
    mpirun -n 4 python3 -m benchmarks.latency [options]      a process for each GPU

    --models qwen3-30b-a3b,deepseek-v3 --tokens 1,8,64,256
    --calls 2000           that are timed, of each batch size
    --launches             also the time of each launch of a call
    --max-tokens 256       of the layer; default: the batch size
    --gbps 380             of the link, each way: a crossing's time is computed
    --out latency_4.json

Each call is one replay of a CUDA graph that the user captures. Weights rotate among copies that the
L2 cache cannot hold together, so they come from memory as in a model of many layers. Calls run back
to back; the time of a call is that between the ends of two, on the slowest rank.

Beside it stands a limit: 25 us, 1.5 times the time of reading the weights of all experts that are
chosen once, at the rate of a large copy, and both crossings of the link. Exits with 1 where a batch
size was not measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import math
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")

import cupy as cp
import numpy as np

import cometrt
from cometrt.bench.contenders import free_memory
from cometrt.bench.records import Results, machine
from cometrt.bench.timing import StartBarrier
from cometrt.bench.workloads import (
    SHAPES,
    Cell,
    crossing_bytes,
    device_normal,
    relative_error,
    routing,
    tolerance,
)
from cometrt.cli.ranks import all_ranks
from cometrt.world.link import LINKS

GROUP, SKIPPED = 40, 5  # timed calls behind a start barrier; calls before them
IDLE_MS = 5.0  # in which the host queues calls
WATCHED = 20  # calls whose launches are timed
COPY_BYTES, COPIES = 1 << 30, 5
L2_MULTIPLE = 3  # bytes of the weights that calls rotate among, over those of the cache
FIXED_US, READ_FACTOR = 25.0, 1.5  # of the limit


class Rank:
    """One rank's layer, arrays, and a captured call for each copy of its weights.

    Args:
        ids: [W, T, K] of all ranks.
    """

    def __init__(
        self, world: cometrt.World, cell: Cell, ids: np.ndarray, max_tokens: int | None
    ) -> None:
        """Collective."""
        self.world, self.spec = world, cell.spec
        if max_tokens is not None:
            self.spec = dataclasses.replace(self.spec, max_tokens=max_tokens)
        self.layer = cometrt.MoELayer(world, self.spec, "fused")
        cp.random.seed(world.rank)
        self.x = self.layer.buffer()[: cell.tokens]
        self.x[...] = device_normal(self.x.shape)
        self.ids = cp.asarray(ids[world.rank])
        self.topk_weights = cp.random.random(self.ids.shape, dtype=cp.float32) + 0.5
        self.y = cp.empty_like(self.x)
        geometry = self.layer.geometry
        of_expert = math.prod(geometry.w_up_shape[1:]) + math.prod(geometry.w_down_shape[1:])
        self.touched_bytes = 2 * of_expert * touched_experts(geometry, ids)
        cache = cp.cuda.Device().attributes["L2CacheSize"]
        needed = math.ceil(L2_MULTIPLE * cache / max(1, self.touched_bytes))
        self.weights = [self._new_weights() for _ in range(max(world.allgather(max(2, needed))))]

    def _new_weights(self) -> tuple[Any, Any]:
        geometry = self.layer.geometry
        return (
            device_normal(geometry.w_up_shape, self.spec.hidden**-0.5),
            device_normal(geometry.w_down_shape, self.spec.intermediate**-0.5),
        )

    def forward(self, copy: int, layer: cometrt.MoELayer | None = None) -> None:
        given = (self.x, self.ids, self.topk_weights, *self.weights[copy])
        (layer or self.layer).forward(*given, training=False, out=self.y)

    def capture(self) -> list[Any]:
        """Collective: a graph for each copy of the weights. Ranks of one process take turns."""
        graphs, stream = [], cp.cuda.get_current_stream()
        for copy in range(len(self.weights)):
            self.forward(copy)
        self.layer.synchronize()
        for turn in range(self.world.size):
            self.world.barrier()
            for copy in range(len(self.weights) if turn == self.world.rank else 0):
                stream.begin_capture()
                self.forward(copy)
                graphs.append(stream.end_capture())
                graphs[-1].upload(stream)  # now: it may wait for the device
            stream.synchronize()
        self.world.barrier()
        return graphs

    def check(self, graphs: list[Any]) -> float:
        """Collective: the relative error of replayed calls from the sequential layer's, the largest
        of all ranks and copies.

        Raises:
            CometError: on all ranks, where it is over the tolerance.
        """
        config, errors = cometrt.TileConfig(num_phases=1), []
        layer = cometrt.MoELayer(self.world, self.spec, "sequential", config=config)
        for copy, graph in enumerate(graphs):
            found = []
            for run in (graph.launch, functools.partial(self.forward, copy, layer)):
                self.y.fill(np.nan)
                cp.cuda.get_current_stream().synchronize()
                self.world.barrier()
                run()
                cp.cuda.get_current_stream().synchronize()
                self.world.barrier()
                found.append(self.y.copy())
            errors.append(relative_error(*found))
        layer.close()
        worst = max(self.world.allgather(max(errors)))
        if not worst <= tolerance("bfloat16"):
            raise cometrt.CometError(f"results differ from those of sequential by {worst}")
        return worst


def touched_experts(geometry: Any, ids: np.ndarray) -> int:
    """Local experts that a token of any rank has chosen."""
    first = geometry.group * geometry.local_experts
    here = ids[(ids >= first) & (ids < first + geometry.local_experts)]
    return len(np.unique(here))


# ---- times -------------------------------------------------------------------------------------


def call_times(rank: Rank, barrier: StartBarrier, graphs: list[Any], calls: int) -> list[float]:
    """Collective: microseconds of each call, of the slowest rank."""
    times: list[float] = []
    for group in range(math.ceil(calls / GROUP)):
        events = [cp.cuda.Event() for _ in range(GROUP + SKIPPED)]
        cp.cuda.get_current_stream().synchronize()
        barrier.close(IDLE_MS)
        for index, event in enumerate(events):
            graphs[(group + index) % len(graphs)].launch()
            event.record()
        events[-1].synchronize()
        times += elapsed_us(events[SKIPPED - 1 :])
    rank.layer.synchronize()
    return [max(found) for found in zip(*rank.world.allgather(times), strict=True)][:calls]


def elapsed_us(events: list[Any]) -> list[float]:
    """Microseconds between an event and the next one."""
    return [1e3 * float(cp.cuda.get_elapsed_time(*two)) for two in itertools.pairwise(events)]


def launch_times(rank: Rank, barrier: StartBarrier) -> dict[str, float]:
    """Collective: microseconds of each launch of a call, the median of the rank where it takes
    longest. Events between launches make a call slower: the sum is more than its time."""
    executor: Any = rank.layer.executor
    kernels, events, names = dict(executor.kernels), [], []

    def watched(name: str, kernel: Callable[..., None]) -> Callable[..., None]:
        def launch(stream: int, *args: Any) -> None:
            kernel(stream, *args)
            names.append(name)
            events.append(cp.cuda.Event())
            events[-1].record()

        return launch

    found: dict[str, list[float]] = {}
    executor.kernels |= {name: watched(name, kernel) for name, kernel in kernels.items()}
    executor.graphs.enabled = False
    try:
        for index in range(SKIPPED + WATCHED):
            names.clear()
            events[:] = [cp.cuda.Event()]
            cp.cuda.get_current_stream().synchronize()
            barrier.close(IDLE_MS)
            events[0].record()
            rank.forward(index % len(rank.weights))
            events[-1].synchronize()
            for name, took in zip(names, elapsed_us(events), strict=True):
                if index >= SKIPPED:
                    found.setdefault(name, []).append(took)
    finally:
        executor.kernels |= kernels
        executor.graphs.enabled = True
    mine = {name: statistics.median(times) for name, times in found.items()}
    ranks = rank.world.allgather(mine)
    return {name: max(times[name] for times in ranks) for name in mine}


def copy_rate(world: cometrt.World, barrier: StartBarrier) -> float:
    """Collective: bytes a second, read and written, of a large copy on all ranks at once; of the
    slowest rank, in the best round."""
    source, target = (cp.empty(COPY_BYTES // 2, cp.uint8) for _ in range(2))
    times, stream = [], cp.cuda.get_current_stream()
    for _ in range(COPIES):
        stream.synchronize()
        barrier.close(IDLE_MS)
        events = [cp.cuda.Event(), cp.cuda.Event()]
        events[0].record()
        target.data.copy_from_device_async(source.data, source.nbytes, stream)
        events[1].record()
        events[1].synchronize()
        times.append(max(world.allgather(elapsed_us(events)[0])))
    return COPY_BYTES / (1e-6 * min(times))


# ---- the run -----------------------------------------------------------------------------------


def measure(world: cometrt.World, cell: Cell, args: argparse.Namespace) -> dict[str, Any]:
    """Collective: an entry of a file of results, equal on all ranks."""
    if cp.cuda.get_current_stream().ptr == 0:  # which cannot be captured
        with cp.cuda.Stream(non_blocking=True):
            return measure(world, cell, args)
    ids = routing(cell)
    rank = Rank(world, cell, ids, args.max_tokens)
    graphs, barrier = rank.capture(), StartBarrier(world)
    error = rank.check(graphs)
    times = call_times(rank, barrier, graphs, args.calls)
    launches = launch_times(rank, barrier) if args.launches else {}
    rate, touched = copy_rate(world, barrier), max(world.allgather(rank.touched_bytes))
    crossing = crossing_bytes(cell, ids)
    crossing_us = 2 * crossing / (1e3 * args.gbps)
    read_us = 1e6 * touched / rate
    entry = {
        "cell": dataclasses.asdict(cell),
        "max_tokens": rank.spec.max_tokens,
        "config": dataclasses.asdict(rank.layer.config),
        "calls": len(times),
        "copies": len(rank.weights),
        "error": error,
        "us": {f"p{percent}": float(np.percentile(times, percent)) for percent in (50, 99)},
        "launches_us": launches,
        "touched_bytes": touched,
        "copy_bytes_per_sec": rate,
        "read_us": read_us,
        "crossing_bytes": crossing,
        "gbps": args.gbps,
        "crossing_us": crossing_us,
        "limit_us": FIXED_US + READ_FACTOR * read_us + crossing_us,
    }
    rank.layer.close()
    world.barrier()
    return {"inference": entry}


def line(name: str, entry: dict[str, Any]) -> str:
    us = entry["us"]
    text = (
        f"{name:32s} p50 {us['p50']:7.1f} us  p99 {us['p99']:7.1f}  limit {entry['limit_us']:6.1f}"
        f"  (weights {entry['read_us']:.1f}, link {entry['crossing_us']:.1f})"
    )
    launches = ", ".join(f"{one} {took:.1f}" for one, took in entry["launches_us"].items())
    return f"{text}\n    {launches}" if launches else text


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--ranks", type=int, help="threads; default: one for each GPU, or four")
    parser.add_argument("--models", default="qwen3-30b-a3b,deepseek-v3")
    parser.add_argument("--tokens", default="1,8,64,256")
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--launches", action="store_true")
    parser.add_argument("--max-tokens", type=int)
    parser.add_argument("--gbps", type=float, default=LINKS["h200"])
    args = parser.parse_args(argv)
    args.models, args.tokens = args.models.split(","), [int(t) for t in args.tokens.split(",")]
    if unknown := set(args.models) - set(SHAPES):
        parser.error(f"--models must be of {', '.join(SHAPES)} (got {', '.join(unknown)})")
    if args.max_tokens is not None and args.max_tokens < max(args.tokens):
        parser.error(f"--max-tokens must be at least {max(args.tokens)} (got {args.max_tokens})")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    ranks = all_ranks(args.ranks, "cuda")
    first = ranks.rank == 0
    results = Results(args.out if first else None, machine())
    cells = [Cell(model, ranks.size, tokens=t) for model in args.models for t in args.tokens]
    missing = 0
    for cell in cells:
        name = f"{cell} max={args.max_tokens}" if args.max_tokens else str(cell)
        work = functools.partial(measure, cell=cell, args=args)
        try:
            results.add(name, ranks.run(work, "cuda", timeout_sec=20))
        except (cp.cuda.memory.OutOfMemoryError, cometrt.CometError) as error:
            results.skip(name, error)
            missing += 1
        free_memory(ranks.devices())
        if first and name in results.skipped:
            print(f"{name} skipped: {results.skipped[name]['reason']}", flush=True)
        elif first:
            print(line(name, results.cells[name]["inference"]), flush=True)
    ranks.barrier()
    if missing:
        sys.exit("not all batch sizes were measured")


if __name__ == "__main__":
    main()
