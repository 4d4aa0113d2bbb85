"""Measure a layer on virtual ranks of one GPU, behind emulated links.

    python -m benchmarks.layer [--cells short|models|alone|all] [--match "qwen3,mixtral T=1024"]
        [--pass forward,backward,both] [--inference] [--contenders fused,sequential,...]
        [--rounds 9] [--idle-ms 20] [--sustain-sec 2] [--seconds 600] [--out layer.json]
    python -m benchmarks.layer --like peers_4.json [--link h200] [--out link_emulation_4.json]

TFLOP/s are those of the GPU: of all ranks in sum, by the slowest of them. With --like, the cells
and the configs are those of a file of benchmarks.peers: does the emulation tell what real GPUs do?
With --out, passes that the file has of this commit and this GPU are not measured again.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")

import cupy as cp

import cometrt
from cometrt.bench.contenders import add_arguments, free_memory, measure_cell
from cometrt.bench.records import Results, line, machine, read
from cometrt.bench.workloads import Cell, cells
from cometrt.world.link import LINKS


def measure(
    cell: Cell, args: argparse.Namespace, config: cometrt.TileConfig | None
) -> dict[str, dict[str, Any]]:
    def fn(world: cometrt.World) -> dict[str, dict[str, Any]]:
        return measure_cell(world, cell, args, config)

    return cometrt.spawn(fn, cell.ranks, "cuda", link=cell.link, timeout_sec=20)[0]


def cells_like(path: Path, link: str) -> list[tuple[Cell, cometrt.TileConfig | None]]:
    """Cells of a file of benchmarks.peers behind that link, with the configs that they had."""
    found = []
    for passes in read(path)["cells"].values():
        entry = next(iter(passes.values()))
        cell = Cell(**(entry["cell"] | {"link": link}))
        found.append((cell, entry["config"] and cometrt.TileConfig(**entry["config"])))
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--cells", choices=["short", "models", "alone", "all"], default="short")
    parser.add_argument("--match", default="", help="comma list; words of a cell's name each")
    parser.add_argument("--like", type=Path)
    parser.add_argument("--link", choices=list(LINKS), default="h200", help="of --like")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="then begin no more")
    add_arguments(parser)
    args = parser.parse_args(argv)
    results, begin, longest, left = Results(args.out, machine()), time.monotonic(), 0.0, []
    chosen = [(cell, cell.config) for cell in cells(args.cells, args.match)]
    for cell, config in cells_like(args.like, args.link) if args.like else chosen:
        name, started = str(cell), time.monotonic()
        if not results.has(name, args.passes):
            if started - begin + longest > args.seconds:
                left.append(name)
                continue
            try:
                results.add(name, measure(cell, args, config))
            except (cp.cuda.memory.OutOfMemoryError, cometrt.CometError) as error:
                results.skip(name, error)
            finally:
                free_memory([0])
            longest = max(longest, time.monotonic() - started)
        if name in results.skipped:
            print(f"{name} skipped: {results.skipped[name]['reason']}", flush=True)
        for which in args.passes if name in results.cells else ():
            if entry := results.cells[name].get(which):
                print(line(name, which, entry), flush=True)
    if left:
        print(f"{len(left)} cells are left for another run, from {left[0]} on")


if __name__ == "__main__":
    main()
