"""Measure a layer's forward on virtual ranks of one GPU, behind modelled links: the digital twin.

python benchmarks/layer.py [--cells short|models|alone|all] [--match "qwen3,mixtral T=1024"]
    [--out results.json] [--seconds 600] [--rounds 7] [--comm-sms 2,4] [--eager]

Fused, sequential, chunked (2 and 4 parts on two streams) and the GEMMs alone take turns behind a
gate on the device; a time is that of the slowest rank. Up to 4,096 tokens all calls are replays
of a graph; beyond, only fused may be, of the layer's own. With --out, cells that the file has at
this commit are not measured again, and what it has of other commits stays until it is. Known
biases: launches and hops weigh too little, and all ranks share one L2 cache and one DRAM.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cupy as cp

import cometrt
from benchmarks.files import machine, read, write
from benchmarks.layer_cells import (
    HEAD,
    Cell,
    busiest_rank,
    cells,
    crossing_bytes,
    figures,
    line,
    routing,
)
from benchmarks.layer_rank import Gate, Rank, take_turns
from cometrt.world.link import LINKS
from cometrt.world.partitions import gpu_sms, num_sms


def measure(cell: Cell, rounds: int, comm_sms: list[int | None], replay: bool) -> dict[str, Any]:
    ids, gate = routing(cell), Gate()

    def fn(world: cometrt.World) -> tuple[dict[str, list[float]], float, int]:
        rank = Rank(world, cell, ids, comm_sms, replay, cell.config)
        distance = rank.check()
        times = take_turns(world, gate, rank.contenders, rounds)
        rank.close()
        return times, distance, num_sms()

    results = cometrt.spawn(fn, cell.ranks, "cuda", link=cell.link, timeout_sec=20)
    distance = max(distance for _, distance, _ in results)
    if not distance < 1e-2:
        raise SystemExit(f"{cell}: a result is {distance:.1e} from that of sequential")
    slowest = {
        name: [max(run) for run in zip(*(times[name] for times, _, _ in results), strict=True)]
        for name in results[0][0]
    }
    crossing, sms = crossing_bytes(cell, ids), results[0][2]
    rate = None if cell.link is None else LINKS[cell.link] * sms / gpu_sms() * 1e9
    return figures(cell, slowest, 0.0 if rate is None else 1e3 * crossing / rate) | {
        "sms": sms,
        "crossing_bytes": crossing,
        "busiest_rank": busiest_rank(cell, ids),
        "distance": distance,
        "replayed": replay,
    }


class Results:
    """What a file holds: cells and those that were skipped, by name, each with its machine."""

    def __init__(self, path: Path | None) -> None:
        self._path, self.here = path, machine()
        self.cells: dict[str, dict[str, Any]] = {}
        self.skipped: dict[str, dict[str, Any]] = {}
        if path and path.exists():
            data = read(path)
            old = {"machine": data["machine"]}
            self.cells = {name: old | cell for name, cell in data["cells"].items()}
            skipped = data["skipped"]
            self.skipped = skipped if isinstance(skipped, dict) else {}

    def has(self, cell: Cell) -> bool:
        found = self.cells.get(str(cell)) or self.skipped.get(str(cell))
        return found is not None and self._is_here(found["machine"])

    def _is_here(self, other: dict[str, Any]) -> bool:
        return all(other[key] == self.here[key] for key in ("commit", "gpu"))

    def add(self, cell: Cell, found: dict[str, Any] | None, reason: str = "") -> None:
        self.cells.pop(str(cell), None)
        self.skipped.pop(str(cell), None)
        if found is None:
            self.skipped[str(cell)] = {"reason": reason, "machine": self.here}
        else:
            self.cells[str(cell)] = found | {"machine": self.here}
        if self._path:
            order = {str(each): i for i, each in enumerate(cells("all"))}
            names = sorted(self.cells, key=lambda name: order.get(name, len(order)))
            ordered = {name: self.cells[name] for name in names}
            data = {"machine": self.here, "cells": ordered, "skipped": self.skipped}
            write(self._path, data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--cells", choices=["short", "models", "alone", "all"], default="short")
    parser.add_argument("--match", default="", help="comma list; words of a cell's name each")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="then begin no more")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--comm-sms", default="", help="comma list; of chunked, beside a GEMM")
    parser.add_argument("--eager", action="store_true", help="no graphs, however few the tokens")
    args = parser.parse_args()
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    comm_sms: list[int | None] = [int(n) for n in args.comm_sms.split(",") if n] or [None]
    results, begin, longest, left = Results(args.out), time.monotonic(), 0.0, []
    print(HEAD)
    for cell in cells(args.cells, args.match):
        if not results.has(cell):
            started = time.monotonic()
            if started - begin + longest > args.seconds:
                left.append(str(cell))
                continue
            try:
                replay = cell.replayed and not args.eager
                results.add(cell, measure(cell, args.rounds, comm_sms, replay))
            except (cp.cuda.memory.OutOfMemoryError, cometrt.CapacityError) as error:
                results.add(cell, None, type(error).__name__)
            finally:
                gc.collect()  # what ranks held, in cycles
                cp.get_default_memory_pool().free_all_blocks()
            longest = max(longest, time.monotonic() - started)
        if str(cell) in results.cells:
            print(line(cell, results.cells[str(cell)]), flush=True)
        else:
            print(f"{cell!s:46s} skipped: {results.skipped[str(cell)]['reason']}", flush=True)
    if left:
        print(f"{len(left)} cells are left for another run, from {left[0]} on")


if __name__ == "__main__":
    main()
