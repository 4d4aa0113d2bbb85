"""Blocks of code in the README and the guide, and how the Python of a page is run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from tests.launch import ROOT, environment, mpirun

_FENCE = re.compile(r"^```(\S*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


class Block(NamedTuple):
    """One fenced block. line: of its first line in the page."""

    page: str
    line: int
    language: str
    text: str


def pages() -> list[str]:
    """All pages that a reader finds, as paths from the root."""
    found = sorted((ROOT / "docs").rglob("*.md"))
    names = [str(path.relative_to(ROOT)) for path in found]
    return ["README.md", "CONTRIBUTING.md", "kernels_cu/README.md", *names]


def blocks_of(page: str) -> list[Block]:
    text = (ROOT / page).read_text()
    return [
        Block(page, text.count("\n", 0, match.start(2)) + 1, match[1], match[2])
        for match in _FENCE.finditer(text)
    ]


def program_of(page: str, device: str) -> str:
    """The page's blocks of Python, one after the other, at the lines that they have in the page.

    Args:
        device: "cuda": as they are. "host": with NumPy for CuPy and the host for GPUs.
    """
    lines: list[str] = []
    for block in blocks_of(page):
        if block.language == "python":
            lines += [""] * (block.line - 1 - len(lines)) + block.text.splitlines()
    program = "\n".join(lines) + "\n"
    if device == "host":
        program = re.sub(r"^import cupy$", "import numpy as cupy", program, flags=re.MULTILINE)
        program = program.replace('device="cuda"', 'device="host"')
    return program


def run_page(page: str, folder: Path, device: str, ranks: int = 1) -> None:
    """Run a page's program in an empty folder, under mpirun for several ranks."""
    script = folder / f"page_{Path(page).stem}.py"
    script.write_text(program_of(page, device))
    if ranks > 1:
        result = mpirun(ranks, "-m", "mpi4py", str(script), cwd=folder)
    else:
        result = subprocess.run(
            [sys.executable, str(script)], capture_output=True, text=True, timeout=240,
            cwd=folder, env=environment(),
        )  # fmt: skip
    assert result.returncode == 0, f"{page}\n{result.stdout}{result.stderr}"
