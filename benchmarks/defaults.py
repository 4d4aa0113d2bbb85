"""Tune the layers of cometrt.models in both passes, and write the shipped configs.

    python -m benchmarks.defaults [--ranks 1,2,4,8] [options]     a thread for each rank
    mpirun -n 4 python3 -m benchmarks.defaults [options]          a process for each GPU

    --models qwen3-30b-a3b,... --tokens 8192,... --tp 1
    --link h100        between virtual ranks, where GPUs are fewer than ranks; or none
    --budget-sec 45    of the search for each layer
    --seconds 540      then no more layers begin
    --again            also what the file has
    --out FILE         default: cometrt/tuner/defaults.json

Layers that the file has in both passes are passed over: so the same command goes on where the last
one ended. The file is written after each layer. Exits with 1 where layers are left.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")

import cupy as cp

import cometrt
from cometrt.bench.contenders import free_memory
from cometrt.bench.records import machine
from cometrt.bench.workloads import EXPERTS, Cell
from cometrt.cli.ranks import Processes, Threads, is_under_mpi
from cometrt.models import MODELS
from cometrt.specs import Geometry
from cometrt.tuner import cache
from cometrt.tuner.search import PASSES, describe
from cometrt.tuner.tune import find
from cometrt.world.link import LINKS

SMALL_FIRST = ("qwen3-30b-a3b", "qwen2-moe", "phi-3.5-moe", "mixtral-8x7b", "deepseek-v3")


class Layer(NamedTuple):
    """What is tuned: the cell's layer with so many experts."""

    cell: Cell
    num_experts: int

    def __str__(self) -> str:
        return f"{self.cell} E={self.num_experts}"

    @property
    def spec(self) -> cometrt.MoESpec:
        return dataclasses.replace(self.cell.spec, num_experts=self.num_experts)


def layers_of(args: argparse.Namespace, ranks: int, link: str | None) -> Iterator[Layer]:
    """With all experts, and with as many as benchmarks have."""
    for tokens in map(int, args.tokens.split(",")):
        for model in args.models.split(","):
            if ranks % args.tp:
                continue
            cell = Cell(model, ranks, args.tp, tokens, link)
            counts = MODELS[model].num_experts, EXPERTS.get(model, MODELS[model].num_experts)
            yield from (Layer(cell, count) for count in dict.fromkeys(counts))


def tuned(world: cometrt.World, layer: Layer, args: argparse.Namespace) -> str:
    """Collective: tune a layer and store what was found, or pass it over. Returns what to say."""
    spec, begin = layer.spec, time.monotonic()
    key = cache.key_of(world, spec)
    stored = cache.read_entries(args.out).get(str(key), {}).get("ms", {})
    if world.allgather(not args.again and set(stored) == set(PASSES))[0]:
        return f"is in the file: {_times(stored)}"
    cometrt.MoELayer(world, spec, "fused", config=cometrt.TileConfig()).close()  # it can be made
    geometry, index = Geometry(spec, world.rank, world.size), world.num_layers - 1
    found = find(world, geometry, index, cometrt.TileConfig(), None, True, args.budget_sec)
    if world.rank == 0:
        facts = {name: value for name, value in machine().items() if name != "gpu"}
        facts["default_ms"] = {which: round(ms, 4) for which, ms in found.base_ms.items()}
        cache.store(args.out, key, found.config, found.ms, **facts)
        written = cache.read_entries(args.out).get(str(key), {}).get("config")
        if written != dataclasses.asdict(found.config):
            raise cometrt.CometError(f"{args.out} cannot be written")
    seconds = time.monotonic() - begin
    default = f"TileConfig() {_times(found.base_ms)}"
    return f"{_times(found.ms)} ({default}) in {seconds:.0f} s: {describe(found.config)}"


def _times(ms: dict[str, float]) -> str:
    return ", ".join(f"{which} {value:.3f} ms" for which, value in ms.items())


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", default="1,2,4,8", help="not under mpirun: all of its ranks")
    parser.add_argument("--models", default=",".join(SMALL_FIRST))
    parser.add_argument("--tokens", default="8192")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--link", choices=[*LINKS, "none"], default="h100")
    parser.add_argument("--budget-sec", type=float, default=45.0)
    parser.add_argument("--seconds", type=float, default=540.0)
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--out", type=Path, default=cache.SHIPPED)
    args = parser.parse_args(argv)
    if unknown := set(args.models.split(",")) - set(MODELS):
        parser.error(f"--models must be of {', '.join(MODELS)} (got {', '.join(unknown)})")
    return args


def worlds(args: argparse.Namespace) -> Iterator[Any]:
    """As many ranks as the options say, or all of mpirun's."""
    if is_under_mpi():
        yield Processes()
        return
    gpus, link = cp.cuda.runtime.getDeviceCount(), None if args.link == "none" else args.link
    for ranks in map(int, args.ranks.split(",")):
        yield Threads(ranks, link if ranks > gpus else None)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    with printed_trials():
        run(args)


@contextlib.contextmanager
def printed_trials() -> Iterator[None]:
    """Within it each trial prints a line."""
    log, handler = logging.getLogger("cometrt"), logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("    %(message)s"))
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


def run(args: argparse.Namespace) -> None:
    begin, longest, left = time.monotonic(), 0.0, []
    todo = [(ranks, layer) for ranks in worlds(args) for layer in layers_of_ranks(ranks, args)]
    for number, (ranks, layer) in enumerate(todo, 1):
        started = time.monotonic()
        if ranks.of_first(started - begin + longest > args.seconds):
            left.append(layer)
            continue
        say(ranks, f"[{number}/{len(todo)}] {layer}")
        try:
            say(ranks, ranks.run(lambda world, layer=layer: tuned(world, layer, args), "cuda", 20))
        except (cp.cuda.memory.OutOfMemoryError, cometrt.CometError, ValueError) as error:
            say(ranks, f"skipped: {type(error).__name__}: {error}".splitlines()[0][:300])
        free_memory(ranks.devices())
        longest = max(longest, time.monotonic() - started)
    if left:
        if todo[0][0].rank == 0:
            print(f"{len(left)} layers are left for another run, from {left[0]} on")
        sys.exit(1)


def layers_of_ranks(ranks: Any, args: argparse.Namespace) -> list[Layer]:
    return list(layers_of(args, ranks.size, ranks.link))


def say(ranks: Any, text: str) -> None:
    if ranks.rank == 0:
        print(text, flush=True)


if __name__ == "__main__":
    main()
