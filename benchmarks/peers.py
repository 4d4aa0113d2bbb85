"""Measure a layer on several GPUs, beside NCCL and beside PyTorch's and JAX's layers.

    python -m benchmarks.peers [--ranks 4] [options]           a thread for each GPU
    mpirun -n 4 python3 -m benchmarks.peers [options]          a process for each GPU

    --models qwen3-30b-a3b,... --tokens 8192,... --tp 1 --skew 0.256 --order columns
    --pass forward,backward,both --inference --contenders fused,sequential,nccl,...
    --rounds 9 --idle-ms 20 --sustain-sec 2
    --rivals torch,jax --rival-sec 300      run afterwards on the same GPUs
    --gbps 380                              of the link, each way: a crossing's time is computed
    --out peers_4.json

TFLOP/s are those of each GPU, by the slowest. The fused layer has the config that a layer gets by
itself. Exits with 1 where a cell was not measured.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")

import cupy as cp

import cometrt
from benchmarks.rivals import CONTENDERS as RIVALS
from benchmarks.rivals import measure_rival
from cometrt.bench.contenders import add_arguments, free_memory, measure_cell
from cometrt.bench.records import Results, line, machine
from cometrt.bench.workloads import SHAPES, Cell
from cometrt.cli.ranks import all_ranks
from cometrt.world.link import LINKS

SMALL_FIRST = ("qwen3-30b-a3b", "qwen2-moe", "phi-3.5-moe", "mixtral-8x7b", "deepseek-v3")


# ---- the run -------------------------------------------------------------------------------


def cells_of(args: argparse.Namespace, ranks: int) -> Iterator[Cell]:
    for model in args.models.split(","):
        for tokens in map(int, args.tokens.split(",")):
            yield Cell(model, ranks, args.tp, tokens, skew=args.skew, order=args.order or "phases")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--ranks", type=int, help="threads; default: one for each GPU, or four")
    parser.add_argument("--models", default=",".join(SMALL_FIRST))
    parser.add_argument("--tokens", default="8192")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--skew", type=float, default=0.0)
    parser.add_argument("--order", help="of the down GEMM's tiles; default: the layer's own choice")
    parser.add_argument("--gbps", type=float, default=LINKS["h200"])
    parser.add_argument("--rivals", default="")
    parser.add_argument("--rival-sec", type=float, default=300.0)
    add_arguments(parser)
    args = parser.parse_args(argv)
    args.rivals = [name for name in args.rivals.split(",") if name]
    for name, known in (("rivals", RIVALS), ("models", SHAPES)):
        given = args.rivals if name == "rivals" else args.models.split(",")
        if unknown := set(given) - set(known):
            parser.error(f"--{name} must be of {', '.join(known)} (got {', '.join(unknown)})")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    ranks = all_ranks(args.ranks, "cuda")
    first = ranks.rank == 0
    results = Results(args.out if first else None, machine())
    cells = list(cells_of(args, ranks.size))
    for cell in cells:
        work = functools.partial(measure, cell=cell, args=args)
        try:
            results.add(str(cell), ranks.run(work, "cuda", timeout_sec=20))
        except (cp.cuda.memory.OutOfMemoryError, cometrt.CometError) as error:
            results.skip(str(cell), error)
        free_memory(ranks.devices())
        if first:
            show(results, cell, args.passes)
    ranks.barrier()
    measured = [cell for cell in cells if str(cell) not in results.skipped]
    for rival in args.rivals if first and measured else ():
        for row in measure_rival(rival, measured, args, args.rival_sec):
            results.add_rival(row)
    if first and args.rivals:
        for cell in measured:
            show(results, cell, args.passes)
    if len(measured) < len(cells):
        sys.exit("not all cells were measured")


def measure(world: cometrt.World, cell: Cell, args: argparse.Namespace) -> dict[str, Any]:
    config = cell.config if args.order else None
    return measure_cell(world, cell, args, config, args.gbps)


def show(results: Results, cell: Cell, passes: list[str]) -> None:
    name = str(cell)
    if name in results.skipped:
        print(f"{name} skipped: {results.skipped[name]['reason']}", flush=True)
        return
    for which in passes:
        print(line(name, which, results.cells[name][which]), flush=True)


if __name__ == "__main__":
    main()
