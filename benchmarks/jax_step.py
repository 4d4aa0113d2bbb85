"""Measure one layer's training step in JAX beside the same calls on CuPy arrays.

    python -m benchmarks.jax_step [--ranks 1,4] [--model qwen3-30b-a3b] [--tokens 8192] [options]

    --layers 1         in a step: so many forwards, then as many backwards
    --warm-up 20 --steps 10 --rounds 9
    --device host      for a try on the CPU, with --model tiny
    --limit-sec 240    for each number of ranks
    --out FILE         default: benchmarks/results/jax_step.json

A step is a forward and its backward. In JAX it is one jitted function; the other side calls
`MoELayer` without `buffer()`. Both have the same world, arrays and process, and take turns. With
one rank there is one process without `jax.distributed`, otherwise a process for each GPU. By
default ranks are 1, and as many as there are GPUs. The overhead is JAX's median over that of the
calls. Times are those of the slowest rank.

Then a round more is watched on GPUs, whose times do not count. It tells where time goes: inside
the calls, between a step's calls, or between steps. "idle" is the share of calls which the host
queued after the device had ended the one before: there the host is the limit. Graphs are those of
all measured rounds. Exits with 1 where something was not measured.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import rivals
from benchmarks.stacks import SHAPES
from cometrt.bench.records import machine, read, write
from cometrt.cli.inputs import pick_device
from cometrt.cli.ranks import is_under_mpi

OUT = Path(__file__).parent / "results" / "jax_step.json"
COUNTS = {"tokens": 8192, "layers": 1, "warm_up": 20, "steps": 10, "rounds": 9}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", help="default: 1, and the number of GPUs")
    parser.add_argument("--model", choices=list(SHAPES), default="qwen3-30b-a3b")
    for name, value in COUNTS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--device", choices=["auto", "host", "cuda"], default="auto")
    parser.add_argument("--limit-sec", type=float, default=240.0)
    parser.add_argument("--out", type=Path, default=OUT)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if is_under_mpi():
        sys.exit("start it without mpirun: it starts a process for each GPU by itself")
    if importlib.util.find_spec("jax") is None:
        sys.exit("not measured: JAX is not installed")
    device = pick_device(args.device)
    gpus = num_gpus() if device == "cuda" else 1
    ranks = [int(text) for text in (args.ranks or f"1,{gpus}").split(",")]
    cells, missing = (read(args.out) or {}).get("cells", {}), False
    for count in dict.fromkeys(ranks):
        name = f"{args.model} W={count} T={args.tokens} L={args.layers}"
        row, outcome = measured(args, device, count)
        if row is None:
            print(f"{name}: {outcome}", flush=True)
            missing = True
            continue
        cells[name] = {"machine": machine(device)} | row
        print("\n".join([name, *lines(cells[name])]), flush=True)
        write(args.out, {"cells": cells})
    if missing:
        sys.exit("not everything was measured")


def num_gpus() -> int:
    import cupy

    return int(cupy.cuda.runtime.getDeviceCount())


def measured(args: argparse.Namespace, device: str, ranks: int) -> tuple[Any, str]:
    """What processes of benchmarks.jax_step_part have found, or None; and how they ended."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        out = Path(folder) / "row.json"
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
        free.close()
        options = {name: getattr(args, name) for name in ("model", *COUNTS)}
        options |= {"device": device, "processes": ranks, "port": port, "out": str(out)}
        start = [sys.executable, "-m", "benchmarks.jax_step_part"]
        commands = [[*start, json.dumps(options | {"process": i})] for i in range(ranks)]
        outcome = rivals.run(commands, args.limit_sec)
        return read(out) or None, outcome


def lines(row: dict[str, Any]) -> list[str]:
    """For the terminal."""
    found = []
    for name, entry in row["times"].items():
        us = entry["us"]
        found.append(
            f"  {name:6s} {us['median']:8.0f} us a step ({us['p10']:.0f} to {us['p90']:.0f}), "
            f"dispatch {entry['dispatch_us']:.0f} us"
        )
        if watched := ", ".join(f"{key} {value:.4g}" for key, value in entry["watched"].items()):
            found.append(f"         {watched}")
    found.append(f"  JAX over the calls: {row['overhead_percent']:+.1f}%")
    found += [f"  XLA also runs: {text}" for text in row["others"]]
    return found


if __name__ == "__main__":
    main()
