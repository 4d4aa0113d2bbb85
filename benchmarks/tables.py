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
    return _layers(re.compile(r" W=8 TP=1 T=8192 link=h100$| W=1 "), means=False)


def all_layers_table() -> list[str]:
    return _layers(re.compile(""), means=True)


def _layers(wanted: re.Pattern[str], *, means: bool) -> list[str]:
    data = json.loads((RESULTS / "layer.json").read_text())
    cells = {name: cell for name, cell in data["cells"].items() if wanted.search(name)}
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
    """GPUs that are peers, the most first, beside the twin's figures for the same cells. What was
    not measured, on GPUs or by the twin, is left out."""
    machines, links, rows = [], [], []
    for path in sorted(RESULTS.glob("peers_*.json"), reverse=True):
        data = json.loads(path.read_text())
        twin = RESULTS / path.name.replace("peers", "twin")
        modelled = json.loads(twin.read_text())["cells"] if twin.exists() else {}
        machines.append(data["machine"])
        links.append(f"{data['gbps']:.0f}")
        cells = data["cells"].items()
        rows += [_peers_row(n, cell, modelled.get(n, {})) for n, cell in cells if "tflops" in cell]
    return [
        f"{' and '.join(each(machines, 'gpu'))}, {' to '.join(ends(each(machines, 'date')))}, at "
        f"{', '.join(each(machines, 'commit'))}; TFLOP/s per GPU, by the slowest of them; link of "
        f"{' and '.join(sorted(set(links)))} GB/s each way.",
        "",
        "| layer | fused | sequential | chunked | NCCL and the engine | its GEMMs alone |"
        " over sequential | over NCCL | efficiency | communication hidden | order |"
        " the twin's fused, GEMMs, over sequential |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
        *rows,
    ]


def _peers_row(name: str, cell: dict[str, Any], modelled: dict[str, Any]) -> str:
    rate, best, nccl, over_nccl, twin = cell["tflops"], cell["best_chunked"], "-", "-", "-"
    if "nccl" in rate:
        nccl, over_nccl = f"{rate['nccl']:.0f}", f"{rate['fused'] / rate['nccl']:.2f}"
    if "tflops" in modelled:
        other = modelled["tflops"]
        twin = f"{other['fused']:.0f}, {other['gemms']:.0f}, " + number(
            modelled, "speedup_over_sequential"
        )
    return (
        f"| {name} | {rate['fused']:.0f} | {rate['sequential']:.0f} | "
        f"{rate[best]:.0f} ({best.removeprefix('chunked ')}) | {nccl} | {rate['gemms']:.0f} | "
        f"{cell['speedup_over_sequential']:.2f} | {over_nccl} | {cell['efficiency']:.2f} | "
        f"{_hidden(cell)} | {cell['config']['order']} | {twin} |"
    )


def link_table() -> list[str]:
    data = json.loads((RESULTS / "link.json").read_text())
    machine, rates = data["machine"], data["gbps"]
    counts = sorted({int(n) for rate in rates.values() if isinstance(rate, dict) for n in rate})
    lines = [
        f"{data['ranks']} {machine['gpu']}, {machine['date']}, at {machine['commit']}; GB/s per "
        "GPU, by CTAs that move rows.",
        "",
        "| | its own choice | " + " | ".join(map(str, counts)) + " |",
        "|---|" + "---|" * (1 + len(counts)),
    ]
    for name, rate in rates.items():
        by_ctas = rate if isinstance(rate, dict) else {"": rate}
        found = [by_ctas.get(count) for count in ("", *map(str, counts))]
        lines.append(f"| {name} | " + " | ".join(f"{r:.0f}" if r else "" for r in found) + " |")
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
        if not args.check:
            path.write_text(wanted)
        elif text != wanted:
            sys.exit(f"{name}: the tables are not those of benchmarks/results")


if __name__ == "__main__":
    main()
