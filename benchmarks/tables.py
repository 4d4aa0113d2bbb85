"""Write the tables of README.md and docs/benchmarks.md from the files in benchmarks/results;
--check: only see whether they are those.

python benchmarks/tables.py [--check]
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable
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
    """The models on eight ranks, and alone on one GPU."""
    return _layers(lambda name: not _varied(name), means=False)


def all_layers_table() -> list[str]:
    return _layers(lambda name: True, means=True)


def _varied(name: str) -> bool:
    """Not a model's own cell, but one around it."""
    return not re.search(r" W=8 TP=1 T=8192 link=h100$| W=1 ", name)


def _layers(wanted: Callable[[str], bool], *, means: bool) -> list[str]:
    data = json.loads((RESULTS / "layer.json").read_text())
    cells = {name: cell for name, cell in data["cells"].items() if wanted(name)}
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
        lines.append(
            f"| {name} | {rate['fused']:.0f} | {rate['sequential']:.0f} | {chunked} | "
            f"{rate['gemms']:.0f} | {cell['speedup_over_sequential']:.2f} | "
            f"{number(cell, 'speedup_over_chunked')} | {cell['efficiency']:.2f} | "
            f"{_hidden(cell)} | {number(cell, 'planning_share', '.1%')} | "
            f"{number(cell, 'busiest_rank')} |"
        )
    if means:
        for what in ("sequential", "chunked"):
            ratios = [c.get(f"speedup_over_{what}") for c in cells.values()]
            if len(ratios) > 1 and all(ratios):
                mean = statistics.geometric_mean(ratios)
                lines += ["", f"Geometric mean over {what}: {mean:.2f}."]
        if data["skipped"]:
            lines += ["", f"Skipped, since they do not fit: {', '.join(data['skipped'])}."]
    return lines


def _hidden(cell: dict[str, Any]) -> str:
    return f"{cell['hidden_share']:.2f}" if "hidden_share" in cell else "little to hide"


def peers_table() -> list[str]:
    """GPUs that are peers, the most first, beside the twin's figures for the same cells."""
    lines: list[str] = []
    for path in sorted(RESULTS.glob("peers_*.json"), reverse=True):
        data = json.loads(path.read_text())
        twin = json.loads((RESULTS / path.name.replace("peers", "twin")).read_text())["cells"]
        machine = data["machine"]
        if not lines:
            lines = [
                f"{machine['gpu']}, {machine['date']}, at {machine['commit']}; TFLOP/s per GPU, by "
                f"the slowest of them; link of {data['gbps']:.0f} GB/s each way.",
                "",
                "| layer | fused | sequential | chunked | NCCL and the engine | its GEMMs alone |"
                " over sequential | over NCCL | efficiency | communication hidden | order |"
                " the twin's fused, GEMMs, over sequential |",
                "|---|---|---|---|---|---|---|---|---|---|---|---|",
            ]
        for name, cell in data["cells"].items():
            rate, ms, other = cell["tflops"], cell["ms"], twin[name]
            best = cell["best_chunked"]
            lines.append(
                f"| {name} | {rate['fused']:.0f} | {rate['sequential']:.0f} | "
                f"{rate[best]:.0f} ({best.removeprefix('chunked ')}) | {rate['nccl']:.0f} | "
                f"{rate['gemms']:.0f} | {cell['speedup_over_sequential']:.2f} | "
                f"{ms['nccl']['median'] / ms['fused']['median']:.2f} | {cell['efficiency']:.2f} | "
                f"{_hidden(cell)} | {cell['config']['layer1_order']} | "
                f"{other['tflops']['fused']:.0f}, {other['tflops']['gemms']:.0f}, "
                f"{other['speedup_over_sequential']:.2f} |"
            )
    return lines


def link_table() -> list[str]:
    data = json.loads((RESULTS / "link.json").read_text())
    machine, rates = data["machine"], data["gbps"]
    counts = sorted({int(n) for rate in rates.values() if isinstance(rate, dict) for n in rate})
    lines = [
        f"{data['ranks']} {machine['gpu']}, {machine['date']}, at {machine['commit']}; GB/s per "
        "GPU by CTAs that move rows; the copy engine and NCCL choose their own.",
        "",
        "| | " + " | ".join(map(str, counts)) + " |",
        "|---|" + "---|" * len(counts),
    ]
    for name, rate in rates.items():
        found = rate if isinstance(rate, dict) else {str(counts[0]): rate}
        row = [f"{found[str(n)]:.0f}" if found.get(str(n)) else "" for n in counts]
        lines.append(f"| {name} | " + " | ".join(row) + " |")
    hops = [f"{name} {value:.2f}" for name, value in data["us"].items()]
    return [*lines, "", f"Microseconds: {', '.join(hops)}."]


def number(cell: dict[str, Any], name: str, form: str = ".2f") -> str:
    return format(cell[name], form) if name in cell else "-"


def each(machines: list[dict[str, Any]], key: str) -> list[str]:
    """Without repetitions, sorted."""
    return sorted({str(machine[key]) for machine in machines})


def ends(values: list[str]) -> list[str]:
    return values if len(values) < 2 else [values[0], values[-1]]


TABLES = {
    "README.md": {"engine": engine_table, "layer": layer_table, "peers": peers_table},
    "docs/benchmarks.md": {"layers": all_layers_table, "link": link_table},
}


def with_tables(text: str, tables: dict[str, Callable[[], list[str]]]) -> str:
    """The text, with what lies between a table's two marks made anew."""
    for name, table in tables.items():
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
    for name, tables in TABLES.items():
        path = ROOT / name
        text = path.read_text()
        wanted = with_tables(text, tables)
        if args.check and text != wanted:
            sys.exit(f"{name}: the tables are not those of benchmarks/results")
        path.write_text(wanted)


if __name__ == "__main__":
    main()
