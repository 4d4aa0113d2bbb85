"""Real text goes through a Mixture-of-Experts layer: results checked, and its timeline drawn.

    mpirun -n 4 python -m mpi4py examples/demo.py        (or: make demo)

Each rank is a process. cometrt/cli/demo.py has what they do, step by step. The command
`cometrt demo` does the same, with ranks that are threads.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from common import add_device_option
from mpi4py import MPI

import cometrt
from cometrt.cli import demo
from cometrt.cli.inputs import pick_device


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=256, help="bytes of text of each rank")
    parser.add_argument("--scale", type=int, default=4, help="divides the model's H and I")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the timeline")
    add_device_option(parser)
    args = parser.parse_args()
    first = MPI.COMM_WORLD.Get_rank() == 0

    def say(text: str) -> None:
        if first:
            print(f"{text} ...", file=sys.stderr, flush=True)

    say("making weights and tokens")
    # The reference and the compiler take their time, so ranks wait for each other up to a minute.
    with cometrt.connect(MPI.COMM_WORLD, pick_device(args.device), timeout_sec=60) as world:
        found = demo.run(world, args.scale, args.tokens, args.out, say)
    if first:
        print(demo.text(found))


if __name__ == "__main__":
    main()
