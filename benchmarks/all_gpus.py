"""All that is to be known of a host with several GPUs, by one command: tests, soaks, figures.

    python -m benchmarks.all_gpus [--steps tests,soak,...] [--scale 0.5] [--dry-run]

    tests     ranks on GPUs of their own against the reference, TP = 1, 2, 4 and all
    soak      5,000 calls with threads for ranks, and 5,000 under mpirun
    defaults  tunes each model's layers in both passes, and writes the shipped configs
    passes    all models, both passes, beside sequential, chunked and NCCL
    nodes     the GPUs as two nodes: calls against the reference, a soak, and figures
    emulated  the same forwards on virtual ranks of one GPU, behind an emulated link

Every step has a time limit, which --scale multiplies. A step that fails does not stop the others.
Figures go to benchmarks/results. Exits with 1 if a step failed.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = os.environ | {  # Open MPI in a container
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
}
CONTENDERS = "fused,sequential,chunked 2,nccl,gemms"


class Step(NamedTuple):
    """A command of a step, and its limit."""

    name: str
    command: list[str]
    limit_sec: float


def steps_of(gpus: int, gpu: str, scale: float) -> list[Step]:
    """All steps on so many GPUs.

    Args:
        gpu: names the GPU in files: h100.
        scale: of the limits.
    """
    python = [sys.executable]
    ranks = ["mpirun", "--bind-to", "none", "-n", str(gpus), *python]
    results = f"benchmarks/results/passes_{gpus}_{gpu}.json"
    emulated = f"benchmarks/results/link_emulation_{gpus}.json"
    soak = ["tests/device/soak.py", "--calls", "5000"]
    half, of_nodes = str(gpus // 2), f"benchmarks/results/nodes_{gpus}.json"
    # As few of NCCL's channels as a network between hosts would be worth, and no more CTAs.
    rail = ["env", "NCCL_MAX_NCHANNELS=4", "NCCL_MAX_CTAS=4", "NCCL_P2P_NVL_CHUNKSIZE=65536"]
    rail.append("NCCL_CGA_CLUSTER_SIZE=1")
    nodes = [*rail, f"COMETRT_RANKS_PER_NODE={half}", *ranks, "-m", "tests.multi.run_cuda_nodes"]
    figures = [*rail, *ranks, "-m", "benchmarks.nodes", "--ranks-per-node", half, "--out", of_nodes]

    def limited(name: str, command: list[str], seconds: float, own: str = "") -> Step:
        seconds *= scale
        return Step(name, [*command, own, f"{seconds:.0f}"] if own else command, seconds + 60)

    peers = [*ranks, "-m", "benchmarks.peers", "--pass", "forward,backward,both"]
    return [
        limited(
            "tests", [*python, "-m", "pytest", "-q", "tests/device/test_peers.py", "--gpu"], 600
        ),
        limited("soak", [*python, *soak, "--ranks", str(gpus)], 300, "--seconds"),
        limited("soak", [*ranks, *soak], 300, "--seconds"),
        limited("defaults", [*ranks, "-m", "benchmarks.defaults"], 300, "--seconds"),
        limited("passes", [*peers, "--contenders", CONTENDERS, "--out", results], 900),
        limited("nodes", [*nodes, "calls", "--soak", "2000"], 300),
        limited("nodes", [*nodes, "calls", "--soak", "2000", "--late", "2"], 300),
        limited("nodes", [*figures, "--parts", "1,2"], 400),
        limited(
            "emulated",
            [*python, "-m", "benchmarks.layer", "--like", results, "--out", emulated],
            600,
        ),
    ]


def run(step: Step) -> str:
    """Run a step's command; what to say of it."""
    begin = time.monotonic()
    try:
        code = subprocess.run(
            step.command, cwd=ROOT, timeout=step.limit_sec, check=False
        ).returncode
        end = "passed" if code == 0 else f"failed with {code}"
    except subprocess.TimeoutExpired:
        end = f"was stopped after {step.limit_sec:.0f} s"
    return f"{end} ({time.monotonic() - begin:.0f} s)"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", default="tests,soak,defaults,passes,nodes,emulated")
    parser.add_argument("--gpus", type=int, help="default: all of this host")
    parser.add_argument("--gpu", help="its name in files; default: as CUDA names it")
    parser.add_argument("--scale", type=float, default=1.0, help="of all time limits")
    parser.add_argument("--dry-run", action="store_true", help="print the commands alone")
    args = parser.parse_args(argv)
    if args.gpus is None or args.gpu is None:
        import cupy

        runtime = cupy.cuda.runtime
        args.gpus = args.gpus or runtime.getDeviceCount()
        name = runtime.getDeviceProperties(0)["name"].decode().split()
        args.gpu = args.gpu or next((word for word in name if word[1:].isdigit()), name[0]).lower()
    steps = [
        s for s in steps_of(args.gpus, args.gpu, args.scale) if s.name in args.steps.split(",")
    ]
    said = []
    for step in steps:
        print(f"$ {shlex.join(step.command)}", flush=True)
        if not args.dry_run:
            said.append(f"{step.name}: {run(step)}")
            print(said[-1], flush=True)
    print(*said, sep="\n")
    sys.exit(int(any(": passed" not in text for text in said)))


if __name__ == "__main__":
    main()
