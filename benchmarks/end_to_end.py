"""Measure Transformer layers with MoE layers, forward and backward, beside JAX's own MoE layer.

    python -m benchmarks.end_to_end [--ranks 4] [--models qwen3-30b-a3b,...] [options]

    --contenders fused,sequential,"jax batched","jax mosaic"
    --layers 2 --sequence 4096 --batch 2    sequences of each GPU
    --steps 50                              of training, whose losses are compared
    --rounds 5 --sustain-sec 2              of each contender: back to back, in so many rounds
    --limit-sec 240                         for all; what was measured by then is kept
    --out end_to_end.json

It starts processes by itself: do not start it by mpirun. Of ours there is a process for each GPU;
of JAX's layers one process for all. The model is that of benchmarks.end_to_end_model. Parts run one
after the other on the same GPUs. Without a GPU they run on CPU devices, with --models tiny.
Exits with 1 where something was not measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import rivals
from benchmarks.stacks import ATTENTION, OURS, RIVALS, Results, Stack, lines
from cometrt.bench.records import machine, read
from cometrt.cli.inputs import pick_device
from cometrt.cli.ranks import is_under_mpi


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--ranks", type=int, help="default: the number of GPUs, or two")
    add("--models", default=",".join(name for name in ATTENTION if name != "tiny"))
    add("--contenders", default=",".join((*OURS, *RIVALS)))
    for name, value in (("layers", 2), ("sequence", 4096), ("batch", 2), ("steps", 50)):
        add(f"--{name}", type=int, default=value)
    add("--rounds", type=int, default=5)
    add("--sustain-sec", type=float, default=2.0)
    add("--limit-sec", type=float, default=240.0)
    add("--device", choices=["auto", "host", "cuda"], default="auto")
    add("--out", type=Path)
    args = parser.parse_args(argv)
    for name, known in (("models", ATTENTION), ("contenders", (*OURS, *RIVALS))):
        given = getattr(args, name).split(",")
        if unknown := set(given) - set(known):
            parser.error(f"--{name} must be of {', '.join(known)} (got {', '.join(unknown)})")
        setattr(args, name, given)
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if is_under_mpi():
        sys.exit("start it without mpirun: it starts a process for each GPU by itself")
    device = pick_device(args.device)
    ranks = args.ranks or (num_gpus() if device == "cuda" else 2)
    stacks = [Stack(model, ranks, args.layers, args.sequence, args.batch) for model in args.models]
    by_name = {str(stack): stack for stack in stacks}
    results = Results(args.out, machine(device))
    parts = [[name for name in args.contenders if name in OURS]]
    parts += [[name] for name in args.contenders if name in RIVALS]
    parts, deadline = [part for part in parts if part], time.monotonic() + args.limit_sec
    for number, part in enumerate(parts):
        left = max(0.0, deadline - time.monotonic())
        contenders = sum(len(later) for later in parts[number:])
        for row in measure_part(stacks, part, device, args, left * len(part) / contenders):
            results.add(by_name[row["stack"]], row)
    missing = False
    for name in by_name:
        entry = results.cells[name]
        print("\n".join([name, *lines(entry)]), flush=True)
        missing |= any("ms" not in entry["times"][one] for one in args.contenders)
    if missing:
        sys.exit("not everything was measured")


def num_gpus() -> int:
    import cupy

    return int(cupy.cuda.runtime.getDeviceCount())


def measure_part(
    stacks: list[Stack],
    contenders: list[str],
    device: str,
    args: argparse.Namespace,
    seconds: float,
) -> list[dict[str, Any]]:
    """Rows of these contenders, which run until they end or their time is over; a row of what was
    not measured says why."""
    count = stacks[0].ranks if contenders[0] in OURS else 1
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        out = Path(folder) / "rows.json"
        free.bind(("localhost", 0))
        options = {
            "stacks": [dataclasses.asdict(stack) for stack in stacks],
            "contenders": contenders,
            "device": device,
            "processes": count,
            "port": free.getsockname()[1],
            "out": str(out),
            "steps": args.steps,
            "rounds": args.rounds,
            "sustain_sec": args.sustain_sec,
            "limit_sec": 0.8 * seconds,  # what has begun may end
        }
        free.close()
        start = [sys.executable, "-m", "benchmarks.end_to_end_part"]
        commands = [[*start, json.dumps(options | {"process": i})] for i in range(count)]
        outcome = rivals.run(commands, seconds)
        rows = read(out) or []
    ended = {(row["stack"], row["contender"]) for row in rows if "ms" in row or "skipped" in row}
    for stack in map(str, stacks):
        for contender in contenders:
            if (stack, contender) not in ended:
                rows.append({"stack": stack, "contender": contender, "skipped": outcome})
    return rows


if __name__ == "__main__":
    main()
