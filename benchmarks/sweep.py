"""Does tuning matter, and does the tuner find the best? Tuned configs beside a sweep.

    python -m benchmarks.sweep [--ranks 2] [options]         a thread for each rank
    mpirun -n 4 python3 -m benchmarks.sweep [options]        a process for each GPU

    --models qwen3-30b-a3b,... --tokens 512,8192 --tp 1
    --link h100        between virtual ranks, where GPUs are fewer than ranks; or none
    --budget-sec 45    of the tuner, for each cell; 45 is the default of `layer.tune`
    --sweep-sec 60     of the sweep, for each cell; then what it has timed is compared
    --out FILE

Each cell, a model's layer with so many tokens, is tuned in both passes, by the search of
`layer.tune`, which starts from `TileConfig()`. Then each pass is timed with every legal combination
of the tuner's alternatives for it, once. The fastest of them and the tuned config take turns for 20
rounds, and their medians are compared. Each cell of a model is also timed with the configs that the
tuner found for its other cells. At last it says by how many percent the tuned config is slower than
the best of the sweep, for each cell and pass.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")

import cometrt
from benchmarks.defaults import worlds
from cometrt.bench.contenders import free_memory
from cometrt.bench.records import machine, read, write
from cometrt.bench.workloads import Cell
from cometrt.cuda.trials import Trials
from cometrt.specs import Geometry
from cometrt.tuner.rail import Rail
from cometrt.tuner.search import (
    PASSES,
    candidates,
    combinations,
    describe,
    legal,
    roomiest,
    with_own_backward,
)
from cometrt.tuner.tune import find
from cometrt.world.link import LINKS
from cometrt.world.partitions import num_sms

ROUNDS, FINALISTS = 20, 8
MODELS = "qwen3-30b-a3b,qwen2-moe,mixtral-8x7b"


def tune(world: cometrt.World, cell: Cell, budget_sec: float) -> cometrt.TileConfig:
    """Collective: what `layer.tune` finds for a layer of this cell."""
    layer = geometry_and_index(world, cell.spec)
    return find(world, *layer, cometrt.TileConfig(), None, True, budget_sec).config


def geometry_and_index(world: cometrt.World, spec: cometrt.MoESpec) -> tuple[Geometry, int]:
    """Collective: of a layer that is made, to see that it can be, and closed."""
    cometrt.MoELayer(world, spec, "fused", config=cometrt.TileConfig()).close()
    return Geometry(spec, world.rank, world.size), world.num_layers - 1


class Bench(NamedTuple):
    """A cell's trials, and what the tuner searches."""

    trials: Trials
    base: cometrt.TileConfig
    settings: list[Any]
    spec: cometrt.MoESpec
    size: int

    @classmethod
    def make(cls, world: cometrt.World, cell: Cell) -> Bench:
        """Collective."""
        spec = cell.spec
        layer = geometry_and_index(world, spec)
        sms = min(world.allgather(num_sms()))
        base = with_own_backward(cometrt.TileConfig(), sms)
        settings = candidates(base, spec, world.size, sms, training=True)
        make = Rail(world, *layer).make
        trials = Trials(world, layer[0], make, None, True, roomiest(base, settings))
        return cls(trials, base, settings, spec, world.size)

    def sweep(self, which: str, tuned: cometrt.TileConfig, seconds: float) -> dict[str, Any]:
        """Time all combinations; see the module's text."""
        trials, times = self.trials, {}
        every = combinations(tuned, self.settings, self.spec, self.size)
        configs = [config for one, config in every if one == which]
        end = self.trials.elapsed_sec + seconds
        for config in configs:
            times[config] = trials.time(config, which, (1, 2))
            if trials.elapsed_sec > end:
                break
        best = sorted(times, key=times.__getitem__)[:FINALISTS]
        medians = self.medians([tuned, *best], which)
        fastest = min(medians, key=medians.__getitem__)
        return {
            "combinations": len(configs),
            "timed": len(times),
            "slowest_ms": max(times.values()),
            "default_ms": trials.time(self.base, which),
            "tuned_ms": medians[tuned],
            "best_ms": medians[fastest],
            "slower_percent": slower_percent(medians[tuned], medians[fastest]),
            "best": dataclasses.asdict(fastest),
        }

    def medians(
        self, configs: list[cometrt.TileConfig], which: str
    ) -> dict[cometrt.TileConfig, float]:
        """Milliseconds by config, which take turns."""
        times: dict[cometrt.TileConfig, list[float]] = {config: [] for config in configs}
        for _ in range(ROUNDS):
            for config, found in times.items():
                found.append(self.trials.time(config, which, (1, 1)))
        return {config: statistics.median(found) for config, found in times.items()}


def slower_percent(tuned_ms: float, best_ms: float) -> float:
    """By how much the tuned config is slower than the best; 0: it is the best."""
    return 100 * (tuned_ms / best_ms - 1)


def measure(world: cometrt.World, cell: Cell, args: argparse.Namespace) -> dict[str, Any]:
    """Collective: tune a cell and sweep it."""
    begin = time.monotonic()
    tuned = tune(world, cell, args.budget_sec)
    seconds = time.monotonic() - begin
    bench = Bench.make(world, cell)
    passes = {which: bench.sweep(which, tuned, args.sweep_sec / 2) for which in PASSES}
    bench.trials.close()
    return {
        "machine": machine(),
        "cell": dataclasses.asdict(cell),
        "tuned": dataclasses.asdict(tuned),
        "tune_sec": seconds,
        "passes": passes,
    }


def cross(world: cometrt.World, cell: Cell, configs: dict[str, Any]) -> dict[str, Any]:
    """Collective: ms of both passes together of a cell with each of these configs that is legal."""
    bench, found = Bench.make(world, cell), {}
    legal_ones = {
        name: made
        for name, fields in configs.items()
        if (made := legal(bench.base, fields, bench.spec, bench.size))
    }
    for which in PASSES:
        medians = bench.medians(list(dict.fromkeys(legal_ones.values())), which)
        for name, config in legal_ones.items():
            found[name] = found.get(name, 0.0) + medians[config]
    bench.trials.close()
    return found


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", default="2", help="not under mpirun: all of its ranks")
    parser.add_argument("--models", default=MODELS)
    parser.add_argument("--tokens", default="512,8192")
    parser.add_argument("--tp", default="1")
    parser.add_argument("--link", choices=[*LINKS, "none"], default="h100")
    parser.add_argument("--budget-sec", type=float, default=45.0)
    parser.add_argument("--sweep-sec", type=float, default=60.0)
    parser.add_argument("--out", type=Path, default=Path("sweep.json"))
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args, measured = parse(argv), dict[str, Any]()
    for ranks in worlds(args):
        for model in args.models.split(","):
            cells = [
                Cell(model, ranks.size, tp, tokens, ranks.link)
                for tokens in map(int, args.tokens.split(","))
                for tp in map(int, args.tp.split(","))
                if ranks.size % tp == 0
            ]
            found: dict[str, Any] = {}
            for cell in cells:
                begin = time.monotonic()
                entry = ranks.run(lambda world, cell=cell: measure(world, cell, args), "cuda", 20)
                free_memory(ranks.devices())
                found[str(cell)] = entry
                keep(args, ranks, found)
                if ranks.rank == 0:
                    print(f"{cell}, {time.monotonic() - begin:.0f} s", *lines(entry), sep="\n")
            configs = {name: entry["tuned"] for name, entry in found.items()}
            for cell in cells:
                times = ranks.run(
                    lambda world, cell=cell, configs=configs: cross(world, cell, configs),
                    "cuda",
                    20,
                )
                free_memory(ranks.devices())
                found[str(cell)]["with_configs_of"] = times
                if ranks.rank == 0:
                    print(f"{cell}, both passes with the config of:")
                    print(*(f"    {name}: {ms:.3f} ms" for name, ms in times.items()), sep="\n")
            measured |= found
            keep(args, ranks, found)
        if ranks.rank == 0:
            print(*summary(measured), sep="\n")


def keep(args: argparse.Namespace, ranks: Any, found: dict[str, Any]) -> None:
    """Write these cells on rank 0, beside those that the file has."""
    if ranks.rank == 0:
        write(args.out, {"cells": read(args.out).get("cells", {}) | found})


def summary(cells: dict[str, Any]) -> list[str]:
    """By how many percent the tuned config is slower than the best of the sweep, by cell and pass;
    and the most of all."""
    text, most = ["the tuned config is slower than the best of the sweep by"], 0.0
    for cell, entry in cells.items():
        percents = {which: found["slower_percent"] for which, found in entry["passes"].items()}
        most = max(most, *percents.values())
        text.append(
            f"    {', '.join(f'{p:.1f}% {which}' for which, p in percents.items())}: {cell}"
        )
    return [*text, f"    at most {most:.1f}%"]


def lines(entry: dict[str, Any]) -> list[str]:
    config = cometrt.TileConfig(**entry["tuned"])
    text = [f"    tuned in {entry['tune_sec']:.0f} s: {describe(config)}"]
    for which, found in entry["passes"].items():
        ms = {
            name: f"{found[name + '_ms']:.3f}" for name in ("tuned", "best", "default", "slowest")
        }
        text.append(
            f"    {which}: tuned {ms['tuned']} ms, the best of {found['timed']} combinations "
            f"{ms['best']} ({found['slower_percent']:+.1f}%), the slowest {ms['slowest']}, default "
            f"{ms['default']}; there are {found['combinations']}"
        )
    return text


if __name__ == "__main__":
    main()
