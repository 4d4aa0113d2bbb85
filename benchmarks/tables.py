"""Write the README's tables from the files in benchmarks/results; --check: only see whether they
are those.

python benchmarks/tables.py [--check]
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def engine_table() -> list[str]:
    data = json.loads((RESULTS / "engine.json").read_text())
    machine = data["machine"]
    lines = [
        f"One {machine['gpu']}, {machine['date']}, at {machine['commit']}; TFLOP/s, medians of "
        "runs that took turns.",
        "",
        "| GEMM | cometrt | torch._grouped_mm | cuBLAS batched | over the better | skewed loads |"
        " dense cuBLAS |",
        "|---|---|---|---|---|---|---|",
    ]
    ratios = []
    for name, shape in data["shapes"].items():
        rate = shape["tflops"]
        ratios.append(rate["engine"] / max(rate["torch"], rate["batched"]))
        lines.append(
            f"| {name} | {rate['engine']:.0f} | {rate['torch']:.0f} | {rate['batched']:.0f} | "
            f"{ratios[-1]:.3f} | {rate['skewed']:.0f} (torch {rate['torch skewed']:.0f}) | "
            f"{rate['dense']:.0f} |"
        )
    mean = statistics.geometric_mean(ratios)
    return [*lines, "", f"Geometric mean over the better peer: {mean:.3f}."]


def layer_table() -> list[str]:
    data = json.loads((RESULTS / "layer.json").read_text())
    cells = data["cells"]
    machines = [cell.get("machine", data["machine"]) for cell in cells.values()]
    lines = [
        f"{' and '.join(each(machines, 'gpu'))} cut into virtual ranks, "
        f"{' to '.join(ends(each(machines, 'date')))}, at {', '.join(each(machines, 'commit'))}; "
        "TFLOP/s of all ranks in sum, by the slowest of them.",
        "",
        "| layer | fused | sequential | chunked | its GEMMs alone | over sequential |"
        " over chunked | efficiency | communication hidden | planning | busiest rank |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, cell in cells.items():
        rate = cell["tflops"]
        best = cell.get("best_chunked")
        chunked = f"{rate[best]:.0f} ({best.removeprefix('chunked ')})" if best else "-"
        hidden = f"{cell['hidden_share']:.2f}" if "hidden_share" in cell else "little to hide"
        lines.append(
            f"| {name} | {rate['fused']:.0f} | {rate['sequential']:.0f} | {chunked} | "
            f"{rate['gemms']:.0f} | {cell['speedup_over_sequential']:.2f} | "
            f"{number(cell, 'speedup_over_chunked')} | {cell['efficiency']:.2f} | {hidden} | "
            f"{number(cell, 'planning_share', '.1%')} | {number(cell, 'busiest_rank')} |"
        )
    if len(cells) > 1:
        for what in ("sequential", "chunked"):
            ratios = [c.get(f"speedup_over_{what}") for c in cells.values()]
            if all(ratios):
                mean = statistics.geometric_mean(ratios)
                lines += ["", f"Geometric mean over {what}: {mean:.2f}."]
    skipped = data["skipped"]
    if skipped:
        lines += ["", f"Skipped, since they do not fit: {', '.join(skipped)}."]
    return lines


def number(cell: dict[str, Any], name: str, form: str = ".2f") -> str:
    return format(cell[name], form) if name in cell else "-"


def each(machines: list[dict[str, Any]], key: str) -> list[str]:
    """Without repetitions, sorted."""
    return sorted({str(machine[key]) for machine in machines})


def ends(values: list[str]) -> list[str]:
    return values if len(values) < 2 else [values[0], values[-1]]


TABLES = {"engine": engine_table, "layer": layer_table}


def with_tables(text: str) -> str:
    """The text, with what lies between a table's two marks made anew."""
    for name, table in TABLES.items():
        mark = re.compile(rf"(<!-- table: {name} -->\n).*?(\n<!-- end -->)", re.DOTALL)
        if not mark.search(text):
            raise SystemExit(f"no place for table {name}")
        body = "\n".join(table())
        text = mark.sub(lambda found, body=body: found[1] + body + found[2], text)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    readme = ROOT / "README.md"
    text = readme.read_text()
    wanted = with_tables(text)
    if args.check:
        sys.exit(0 if text == wanted else "README's tables are not those of benchmarks/results")
    readme.write_text(wanted)


if __name__ == "__main__":
    main()
