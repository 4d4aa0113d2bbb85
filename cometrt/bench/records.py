"""What benchmarks write: JSON files of measured times, and the figures that follow from them.

A file of layers is {"cells": {cell: {pass: entry}}, "skipped": {cell: {...}}}. An entry has its
machine, facts of the cell, and "times": {contender: {"isolated": spread, "sustained": ms}}; a
contender that was not measured has {"skipped": reason}.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import subprocess
from pathlib import Path
from typing import Any

SHARE_TO_HIDE = 0.3  # of the GEMMs: what two crossings must take for "hidden" to mean anything


def write(path: Path | None, value: Any) -> None:
    """Replace the file at once: a run that is stopped leaves the last one. None: nowhere."""
    if path is not None:
        new = path.with_suffix(".new")
        new.write_text(json.dumps(value, indent=1) + "\n")
        os.replace(new, path)


def read(path: Path) -> Any:
    return json.loads(path.read_text()) if path.exists() else {}


def machine(device: str = "cuda") -> dict[str, Any]:
    """GPU, driver, date and commit; COMETRT_COMMIT where there is no repository to ask. On "host"
    the CPU stands in place of the GPU."""
    gpu, driver = platform.processor() or platform.machine(), 0
    if device == "cuda":
        import cupy as cp

        gpu = cp.cuda.runtime.getDeviceProperties(0)["name"].decode()
        driver = cp.cuda.runtime.driverGetVersion()
    return {
        "gpu": gpu,
        "driver": driver,
        "date": datetime.date.today().isoformat(),
        "commit": os.environ.get("COMETRT_COMMIT") or _commit(),
    }


def _commit() -> str:
    asked = ["git", "rev-parse", "--short", "HEAD"]
    try:
        found = subprocess.run(asked, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return found.stdout.strip()


def spread(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    tenth = len(ordered) // 10
    return {
        "median": statistics.median(ordered),
        "p10": ordered[tenth],
        "p90": ordered[-1 - tenth],
    }


class Results:
    """A file of layers. Passes of this machine and commit replace others as they are measured."""

    def __init__(self, path: Path | None, here: dict[str, Any]) -> None:
        self._path, self.here = path, here
        data = read(path) if path else {}
        self.cells: dict[str, dict[str, Any]] = data.get("cells", {})
        self.skipped: dict[str, dict[str, Any]] = data.get("skipped", {})

    def has(self, cell: str, passes: list[str]) -> bool:
        """Whether all of that, or why it was skipped, was found here."""
        entries = [self.cells.get(cell, {}).get(which) for which in passes]
        return self._is_here(self.skipped.get(cell)) or all(map(self._is_here, entries))

    def _is_here(self, entry: dict[str, Any] | None) -> bool:
        found = entry["machine"] if entry else {}
        return bool(found) and all(found[key] == self.here[key] for key in ("commit", "gpu"))

    def add(self, cell: str, passes: dict[str, dict[str, Any]]) -> None:
        self.skipped.pop(cell, None)
        entries = self.cells.setdefault(cell, {})
        for which, entry in passes.items():
            entries[which] = {"machine": self.here} | entry
        self.save()

    def skip(self, cell: str, error: BaseException) -> None:
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        self.skipped[cell] = {"machine": self.here, "reason": reason}
        self.save()

    def add_rival(self, row: dict[str, Any]) -> None:
        """One that `rival_row` made; the entry of our own times must be there."""
        entry = self.cells[row["cell"]][row["pass"]]
        kept = {key: row[key] for key in ("isolated", "sustained", "skipped") if key in row}
        entry["times"][row["contender"]] = kept
        self.save()

    def save(self) -> None:
        write(self._path, {"cells": self.cells, "skipped": self.skipped})


def rival_row(
    cell: Any, which: str, contender: str, isolated: list[float], sustained: float
) -> dict[str, Any]:
    """What a rival prints and returns for one pass of a cell; times in milliseconds."""
    return {
        "cell": str(cell),
        "model": cell.model,
        "tokens": cell.tokens,
        "ranks": cell.ranks,
        "pass": which,
        "contender": contender,
        "isolated": spread(isolated),
        "sustained": sustained,
    }


# ---- figures ---------------------------------------------------------------------------------


def medians(entry: dict[str, Any]) -> dict[str, float]:
    """Milliseconds of isolated calls, by contender."""
    times = entry["times"].items()
    return {name: found["isolated"]["median"] for name, found in times if "isolated" in found}


def tflops(entry: dict[str, Any], contender: str, *, sustained: bool = False) -> float | None:
    """TFLOP/s of a GPU; None: not measured."""
    found = entry["times"].get(contender, {})
    ms = found.get("sustained") if sustained else found.get("isolated", {}).get("median")
    return entry["flops"] / ms / 1e9 if ms else None


def best(entry: dict[str, Any], prefix: str) -> str | None:
    """The fastest of the contenders whose names begin so."""
    ms = medians(entry)
    return min((n for n in ms if n.startswith(prefix)), key=ms.__getitem__, default=None)


def figures(entry: dict[str, Any]) -> dict[str, float]:
    """Ratios of an entry's isolated times; those that were not measured are left out.

    efficiency: the longer of the GEMMs alone and one crossing of the link, over fused. hidden: 1 -
    (fused - GEMMs) / (two crossings). planning: its share of fused. over NAME: NAME's time over
    fused's.
    """
    ms, crossing = medians(entry), entry["link_ms"]
    fused, gemms = ms.get("fused"), ms.get("gemms")
    if fused is None:
        return {}
    found = {f"over {name}": value / fused for name, value in ms.items() if name != "fused"}
    if chunked := best(entry, "chunked"):
        found["over chunked"] = ms[chunked] / fused
    if "planning" in ms:
        found["planning"] = ms["planning"] / fused
    if gemms is not None:
        found["efficiency"] = max(gemms, crossing) / fused
        if 2 * crossing >= SHARE_TO_HIDE * gemms:
            found["hidden"] = 1 - (fused - gemms) / (2 * crossing)
    return found


def step_gb(entry: dict[str, Any], contender: str) -> float | None:
    """10^9 bytes at the peak of a forward and its backward; None: not measured."""
    found = entry.get("step_bytes", {}).get(contender)
    return found["total"] / 1e9 if found else None


def line(cell: str, which: str, entry: dict[str, Any]) -> str:
    """For the terminal: milliseconds, TFLOP/s, and the same sustained, of each contender; and the
    memory of a step."""
    parts = []
    for name, found in entry["times"].items():
        if "skipped" in found:
            parts.append(f"  {name:14s} {found['skipped']}")
            continue
        text = f"  {name:14s} {found['isolated']['median']:8.3f} ms"
        if name != "planning":
            text += f" {tflops(entry, name):5.0f} TFLOP/s"
        if found.get("sustained"):
            rate = tflops(entry, name, sustained=True)
            text += f"   sustained {found['sustained']:8.3f} ms {rate:5.0f} TFLOP/s"
        parts.append(text)
    ratios = ", ".join(f"{name} {value:.2f}" for name, value in figures(entry).items())
    for name in entry.get("step_bytes", {}):
        parts.append(f"  {name:14s} {step_gb(entry, name):8.2f} GB at the peak of a step")
    return "\n".join([f"{cell} {which}: {ratios}", *parts])
