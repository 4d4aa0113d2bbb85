"""Layers of other frameworks: how benchmarks.peers starts them, and what they have in common.

Each is a module benchmarks.rivals_NAME that takes the options below, measures the same passes of
the same cells in the same two ways as cometrt.bench.timing, and writes rows of `records.rival_row`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from cometrt.bench.records import read, rival_row, write
from cometrt.bench.timing import Method
from cometrt.bench.workloads import Cell

CONTENDERS = {"torch": ["torch dedup", "torch pairs"], "jax": ["jax ragged"]}
_LAUNCHERS = ("OMPI_", "PMI", "MPI", "HYDRA")  # variables of mpirun


# ---- in benchmarks.peers -----------------------------------------------------------------------


def measure_rival(
    rival: str, cells: list[Cell], args: argparse.Namespace, seconds: float
) -> list[dict[str, Any]]:
    """Rows of a rival, which runs until it ends or its time is over. A row of what it has not
    measured says why.

    Args:
        cells: all with the same number of ranks.
        args: with `passes`, and the fields of Method.
    """
    if importlib.util.find_spec(rival) is None:
        rows, outcome = [], f"{rival} is not installed"
    else:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "rows.json"
            outcome = run([command(rival, cells, args, out)], seconds)
            rows = read(out) or []
    there = {(row["cell"], row["pass"], row["contender"]) for row in rows}
    for cell in cells:
        for which in args.passes:
            for contender in CONTENDERS[rival]:
                if (str(cell), which, contender) not in there:
                    missing = {"cell": str(cell), "pass": which, "contender": contender}
                    rows.append(missing | {"skipped": outcome})
    return rows


def command(rival: str, cells: list[Cell], args: argparse.Namespace, out: Path) -> list[str]:
    start = [sys.executable, "-m"]
    if rival == "torch":  # a process for each GPU
        number = f"--nproc-per-node={cells[0].ranks}"
        start += ["torch.distributed.run", "--standalone", number, "-m"]
    options = {f.name: getattr(args, f.name) for f in dataclasses.fields(Method)}
    options |= {"pass": ",".join(args.passes), "out": out}
    options["cells"] = json.dumps([dataclasses.asdict(cell) for cell in cells])
    texts = (text for name in options for text in (f"--{_option(name)}", str(options[name])))
    return [*start, f"benchmarks.rivals_{rival}", *texts]


def _option(name: str) -> str:
    return name.replace("_", "-")


def run(commands: list[list[str]], seconds: float) -> str:
    """Run processes until all have ended, one has failed, or their time is over. How that was, for
    what they have not measured."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(_LAUNCHERS)}
    deadline, processes = time.monotonic() + seconds, list[subprocess.Popen[bytes]]()
    try:
        for command in commands:
            processes.append(subprocess.Popen(command, env=environment, start_new_session=True))
        while time.monotonic() < deadline:
            codes = [process.poll() for process in processes]
            if failed := [code for code in codes if code]:
                return f"failed with exit code {failed[0]}"
            if None not in codes:
                return "not measured"
            time.sleep(0.05)
        return f"stopped after {seconds:g} s"
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):  # all that it started
                os.killpg(process.pid, 9)
            process.wait()


# ---- in a rival --------------------------------------------------------------------------------


def parse(description: str | None, argv: list[str] | None = None) -> argparse.Namespace:
    """With `cells`, `passes`, `out`, and `method`."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cells", required=True, help="JSON list of the fields of Cell")
    parser.add_argument("--pass", dest="passes", default="forward,backward,both")
    parser.add_argument("--out", type=Path)
    Method.add_arguments(parser)
    args = parser.parse_args(argv)
    args.cells = [Cell(**fields) for fields in json.loads(args.cells)]
    args.passes, args.method = args.passes.split(","), Method.of(args)
    return args


class Rows:
    """What a rival has measured: printed, and written as it comes."""

    def __init__(self, path: Path | None) -> None:
        self._path, self._rows = path, list[dict[str, Any]]()

    def add(
        self, cell: Cell, which: str, contender: str, isolated: list[float], sustained: float
    ) -> dict[str, Any]:
        row = rival_row(cell, which, contender, isolated, sustained)
        self._rows.append(row)
        write(self._path, self._rows)
        ms, work = row["isolated"]["median"], cell.flops(which) / 1e9
        text = f"{cell} {which}: {contender} {ms:.3f} ms {work / ms:.0f} TFLOP/s"
        if sustained:
            text += f", sustained {sustained:.3f} ms {work / sustained:.0f} TFLOP/s"
        print(text, flush=True)
        return row
