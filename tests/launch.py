"""Start a script under the mpirun that belongs to this Python's MPI."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def python_path() -> str:
    """This checkout, before the folders that PYTHONPATH names."""
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


def environment() -> dict[str, str]:
    """Of a script that imports the package of this checkout, whatever its folder."""
    return os.environ | {"PYTHONPATH": python_path()}


def run_python(*arguments: str, timeout_sec: float = 280) -> str:
    """What ``python arguments...`` prints; a failure shows all of it."""
    result = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=timeout_sec, cwd=ROOT
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def mpirun_command(ranks: int) -> list[str]:
    """The begin of a command on that many ranks; [] where there is no mpirun."""
    beside = str(Path(sys.executable).parent)
    program = shutil.which("mpirun", path=beside) or shutil.which("mpirun")
    if program is None:
        return []
    version = subprocess.run([program, "--version"], capture_output=True, text=True).stdout
    flags = ["--allow-run-as-root", "--oversubscribe"] if "Open MPI" in version else []
    return [program, *flags, "-n", str(ranks)]


def mpirun(ranks: int, *arguments: str, timeout_sec: float = 240, cwd: Path = ROOT):
    """Run ``python arguments...`` on that many ranks; skip where there is no MPI."""
    pytest.importorskip("mpi4py", reason="needs mpi4py")
    command = mpirun_command(ranks)
    if not command:
        pytest.skip("needs mpirun")
    return subprocess.run(
        [*command, sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=timeout_sec,
        cwd=cwd,
        env=environment(),
    )
