"""Write the tables of docs/benchmarks.md and README.md from the files in benchmarks/results.

python -m benchmarks.tables [--check]       --check: only see whether the tables are those
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import stacks
from cometrt.bench.records import best, figures, read, step_gb, tflops

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BESIDE = {  # columns of contenders
    "fused": "fused",
    "sequential": "sequential",
    "chunked": "chunked",
    "nccl": "NCCL and our GEMMs",
    "torch dedup": "PyTorch, a token once",
    "torch pairs": "PyTorch, every pair",
    "jax ragged": "JAX",
    "gemms": "GEMMs alone",
}
SHORT_FILE = "passes_4_h200.json"
SHORT_MODELS, SHORT_TOKENS = ("qwen3-30b-a3b", "mixtral-8x7b"), 8192
_STEP_MEMORY = "peak memory of a step, GB: fused, sequential"
PARTS = ("gemms", "planning")  # of a layer: not what it is compared with


def engine_table() -> list[str]:
    """The forward's GEMMs, and the backward's where the file has them."""
    data = read(RESULTS / "engine.json")
    machine, shapes = data["machine"], data["shapes"]
    lines = [
        f"One {machine['gpu']}, {machine['date']}, at {machine['commit']}; TFLOP/s, medians of "
        "runs that took turns.",
        "",
        *gemms_table({name: one for name, one in shapes.items() if not name.endswith("grad")}),
    ]
    if backward := {name: one for name, one in shapes.items() if name.endswith("grad")}:
        lines += ["", "The backward's:", "", *gemms_table(backward, "layer's own results")]
    return lines


def gemms_table(shapes: dict[str, Any], own: str = "") -> list[str]:
    """Args:
    own: head of a column for results that only the layer has, if it is there.
    """
    head = ["GEMM", "cometrt", "torch._grouped_mm", "cuBLAS batched", "over the better"]
    lines = heading([*head, "skewed loads", "dense cuBLAS", *([own] if own else [])])
    ratios = []
    for name, shape in shapes.items():
        rate = shape["tflops"]
        ratios.append(rate["engine"] / max(rate["torch"], rate["batched"]))
        rates = [f"{rate[one]:.0f}" for one in ("engine", "torch", "batched")]
        skewed = f"{rate['skewed']:.0f} (torch {rate['torch skewed']:.0f})"
        cells = [name, *rates, f"{ratios[-1]:.3f}", skewed, f"{rate['dense']:.0f}"]
        lines.append(row([*cells, own_results(shape)] if own else cells))
    mean = statistics.geometric_mean(ratios)
    return [*lines, "", f"Geometric mean over the better peer: {mean:.3f}."]


def own_results(shape: dict[str, Any]) -> str:
    """Their time over that of the GEMM alone, and over that of copying as many bytes, where this
    takes longer."""
    ms, parts = {name: found["median"] for name, found in shape["ms"].items()}, []
    for name, copied in shape["copy_ms"].items():
        of_copy = f" ({ms[name] / copied:.2f})" if copied > ms["engine"] else ""
        parts.append(f"{name} {ms[name] / ms['engine']:.2f}{of_copy}")
    return ", ".join(parts) or "-"


def layers_table() -> list[str]:
    """Virtual ranks of one GPU."""
    entries = list(entries_of(RESULTS / "layer.json"))
    head = ["layer", "pass", "fused", "sequential", "chunked", "GEMMs alone"]
    ratios = ["over sequential", "over chunked", "efficiency", "communication hidden"]
    last = ["planning", "busiest rank", _STEP_MEMORY, "commit"]
    lines = [
        f"{gpus(entries)} cut into virtual ranks; TFLOP/s of all ranks in sum, by the slowest of "
        "them; isolated, and after a comma sustained where it was measured.",
        "",
        *heading([*head, *ratios, *last]),
    ]
    for name, which, entry in entries:
        found = figures(entry)
        rates = [rate(entry, one) for one in ("fused", "sequential", "chunked", "gemms")]
        over = [number(found, f"over {one}") for one in ("sequential", "chunked")]
        shares = [number(found, "efficiency"), hidden(found), number(found, "planning", ".1%")]
        busiest = number(entry, "busiest_rank")
        cells = [*rates, *over, *shares, busiest, step_memory(entry)]
        lines.append(row([name, which, *cells, commit(entry)]))
    for what in ("sequential", "chunked"):
        found = [f for *_, e in entries if (f := figures(e).get(f"over {what}"))]
        if len(found) > 1:
            lines += ["", f"Geometric mean over {what}: {statistics.geometric_mean(found):.2f}."]
    skipped = read(RESULTS / "layer.json").get("skipped", {})
    if skipped:
        lines += ["", f"Skipped, since they did not fit: {', '.join(skipped)}."]
    return lines


def peers_table() -> list[str]:
    """Layers on several GPUs, and what else computes them there."""
    entries = list(peers())
    lines = [
        f"{gpus(entries)}; TFLOP/s per GPU, by the slowest of them; isolated, and after a comma "
        "sustained where it was measured.",
        "",
        *heading(["layer", "pass", *BESIDE.values(), "over the best other", "commit"]),
    ]
    for name, which, entry in entries:
        rates = [rate(entry, one) for one in BESIDE]
        others = [one for one in entry["times"] if one != "fused" and one not in PARTS]
        over = [value for one in others if (value := figures(entry).get(f"over {one}"))]
        least = f"{min(over):.2f}" if over else "-"
        lines.append(row([name, which, *rates, least, commit(entry)]))
    reasons = {
        f"{one} ({found['skipped']})"
        for *_, entry in entries
        for one, found in entry["times"].items()
        if "skipped" in found
    }
    return [*lines, "", f"Not measured: {', '.join(sorted(reasons))}."] if reasons else lines


def overlap_table() -> list[str]:
    """Forwards on several GPUs: what hides, and what link emulation on one of them says."""
    emulated = {}
    for path in sorted(RESULTS.glob("link_emulation_*.json")):
        for name, _, entry in entries_of(path, "forward"):
            emulated[name.split(" link=")[0]] = entry
    entries = list(peers("forward"))
    head = ["layer", "crossing, ms", "planning", "efficiency", "communication hidden", "order"]
    compared = ["fused, GEMMs, over sequential", "by link emulation"]
    lines = [f"{gpus(entries)}; isolated.", "", *heading([*head, *compared, "commit"])]
    for name, _, entry in entries:
        found, other = figures(entry), emulated.get(name)
        shares = [number(found, "planning", ".1%"), number(found, "efficiency"), hidden(found)]
        order = (entry["config"] or {}).get("order", "-")
        cells = [name, f"{entry['link_ms']:.2f}", *shares, order, summary(entry), summary(other)]
        lines.append(row([*cells, commit(entry)]))
    return lines


def short_table() -> list[str]:
    """For the README: both passes of two models on four GPUs, and a step of Transformer layers
    beside JAX's own MoE layer."""
    passes = read(RESULTS / SHORT_FILE)["cells"]
    stacks_by_model = {
        entry["stack"]["model"]: entry
        for entry in read(RESULTS / "end_to_end.json").get("cells", {}).values()
    }
    pair = "sequential, fused"
    lines = heading(
        ["layer", f"forward: {pair}", f"backward: {pair}", "Transformer step, ms: JAX, fused"]
    )
    machines = []
    for model in SHORT_MODELS:
        of_model = passes[f"{model} W=4 T={SHORT_TOKENS}"]
        cells = [
            ", ".join(f"{tflops(of_model[which], one):.0f}" for one in ("sequential", "fused"))
            for which in ("forward", "backward")
        ]
        stack = stacks_by_model.get(model)
        found = (
            {name: stacks.figures(stack, name) for name in (*stacks.RIVALS, "fused")}
            if stack
            else {}
        )
        ms = {name: one["ms"] for name, one in found.items() if one}
        jax = min((ms[name] for name in stacks.RIVALS if name in ms), default=None)
        cells.append(f"{jax:.1f}, {ms['fused']:.1f}" if jax and "fused" in ms else "-")
        lines.append(row([model, *cells]))
        machines += [of_model[which]["machine"] for which in ("forward", "backward")]
    commits = ", ".join(dict.fromkeys(machine["commit"] for machine in machines))
    text = f"4 x {machines[0]['gpu']}, {machines[0]['date']}, at {commits}; {SHORT_TOKENS}"
    return [*lines, "", f"{text} tokens a GPU, bfloat16, TFLOP/s per GPU; the slowest GPU counts."]


def passes_table() -> list[str]:
    """Both passes with a GPU for each rank, in files of this package's modes alone."""
    entries = [
        entry for path in sorted(RESULTS.glob("passes_*.json")) for entry in entries_of(path)
    ]
    lines = [
        f"{gpus(entries)}; TFLOP/s per GPU, by the slowest of them; isolated, and after a comma "
        "sustained.",
        "",
        *heading(["layer", "pass", "fused", "sequential", _STEP_MEMORY, "commit"]),
    ]
    for name, which, entry in entries:
        rates = [rate(entry, one) for one in ("fused", "sequential")]
        lines.append(row([name, which, *rates, step_memory(entry), commit(entry)]))
    return lines


def end_to_end_table() -> list[str]:
    """Transformer layers with MoE layers."""
    cells = read(RESULTS / "end_to_end.json").get("cells", {})
    if not cells:
        return ["Not measured yet."]
    machines = [("", "", entry) for entry in cells.values()]
    head = ["stack", "heads: queries, keys, columns"]
    head += ["fused", "sequential", "JAX, batched GEMMs", "JAX, Mosaic GEMMs"]
    last = ["sequential over fused", "the best of JAX over fused", "losses differ by (noise)"]
    lines = [
        f"{gpus(machines)}; milliseconds of a step (tenth to ninetieth percentile of rounds), "
        "tokens per second of all GPUs, and the share of MoE layers.",
        "",
        *heading([*head, *last, "commit"]),
    ]
    for name, entry in cells.items():
        shape = entry["shape"]
        heads = f"{shape['heads']}, {shape['kv_heads']}, {shape['head_size']}"
        found = {one: stacks.figures(entry, one) for one in (*stacks.OURS, *stacks.RIVALS)}
        over = {one: f["over_fused"] for one, f in found.items() if "over_fused" in f}
        best_of_jax = min((over[one] for one in stacks.RIVALS if one in over), default=None)
        gaps = [f["loss_gap"] for f in found.values() if "loss_gap" in f]
        ratios = [f"{over['sequential']:.3f}" if "sequential" in over else "-"]
        ratios.append(f"{best_of_jax:.3f}" if best_of_jax else "-")
        noise = f" ({found['fused']['loss_noise']:.1e})" if "loss_noise" in found["fused"] else ""
        ratios.append(f"{max(gaps):.1e}{noise}" if gaps else "-")
        times = [step_time(entry, one, figures) for one, figures in found.items()]
        lines.append(row([name, heads, *times, *ratios, commit(entry)]))
    return lines


def step_time(entry: dict[str, Any], contender: str, found: dict[str, float]) -> str:
    if not found:
        return "-"
    spread = entry["times"][contender]["ms"]
    text = f"{found['ms']:.2f} ({spread['p10']:.2f} to {spread['p90']:.2f})"
    return f"{text}, {found['tokens_per_sec']:,.0f}, {found['moe_share']:.0%}"


def latency_table() -> list[str]:
    """Forwards of small batches in inference."""
    paths = sorted(RESULTS.glob("latency_*.json"), reverse=True)  # most GPUs first
    entries = [entry for path in paths for entry in entries_of(path)]
    if not entries:
        return ["Not measured yet."]
    head = [
        "layer",
        "p50, us",
        "p99, us",
        "limit, us",
        "weights once, us",
        "by launch, us",
        "commit",
    ]
    lines = [f"{gpus(entries)}; the slowest rank counts.", "", *heading(head)]
    for name, _, entry in entries:
        us = [entry["us"]["p50"], entry["us"]["p99"], entry["limit_us"], entry["read_us"]]
        launches = ", ".join(f"{one} {took:.0f}" for one, took in entry["launches_us"].items())
        cells = [name, *(f"{value:.0f}" for value in us), launches or "-", commit(entry)]
        lines.append(row(cells))
    return lines


def small_table() -> list[str]:
    """Both passes of small batches in training, and what else computes them on the same GPUs."""
    paths = sorted(RESULTS.glob("small_*.json"), reverse=True)
    entries = [entry for path in paths for entry in entries_of(path)]
    if not entries:
        return ["Not measured yet."]
    shown = [one for one in BESIDE if any(one in entry["times"] for *_, entry in entries)]
    lines = [
        f"{gpus(entries)}; microseconds, by the slowest rank; isolated, and after a comma "
        "sustained.",
        "",
        *heading(["layer", "pass", *(BESIDE[one] for one in shown), "commit"]),
    ]
    for name, which, entry in entries:
        times = (entry["times"].get(one, {}) for one in shown)
        lines.append(row([name, which, *map(microseconds, times), commit(entry)]))
    return lines


def microseconds(found: dict[str, Any]) -> str:
    if "isolated" not in found:
        return "-"
    sustained = f", {1e3 * found['sustained']:,.0f}" if "sustained" in found else ""
    return f"{1e3 * found['isolated']['median']:,.0f}{sustained}"


def nodes_table() -> list[str]:
    """Layers over several nodes of one host."""
    files = [read(path) for path in sorted(RESULTS.glob("nodes_*.json"))]
    cells = [(data, *cell) for data in files for cell in data["cells"].items()]
    if not cells:
        return ["Not measured yet."]
    alone = ("node alone", "rail alone", "all-to-all", "one node")
    machines = gpus([("", "", data) for data in files])
    lines = [
        f"{machines}; milliseconds a call, back to back, by the slowest rank. In brackets the "
        "share of the shorter of node and rail that is hidden.",
        "",
        *heading(
            ["layer", "rail, GB/s", "pass", "over nodes: slices, or late parts", *alone, "commit"]
        ),
    ]
    for data, name, entry in cells:
        limit = f", limit {entry['limit']}" if "limit" in entry else ""
        for which, ms in entry["times"].items():
            hidden = entry["hidden"][which]
            over = ", ".join(
                f"{one.removeprefix('nodes, ')}: {value:.2f}"
                + (f" ({hidden[one]:.2f})" if one in hidden else "")
                for one, value in ms.items()
                if one.startswith("nodes")
            )
            times = [f"{ms[one]:.2f}" if one in ms else "-" for one in alone]
            rate_of = f"{entry['rail_gbps']:.0f}"
            lines.append(row([f"{name}{limit}", rate_of, which, over, *times, commit(data)]))
    return lines


def sweep_table() -> list[str]:
    """Tuned configs beside the best of a sweep over the tuner's settings."""
    cells = read(RESULTS / "sweep.json").get("cells", {})
    if not cells:
        return ["Not measured yet."]
    head = ["layer", "pass", "tuned, ms", "the best of the sweep", "slower by", "default"]
    machines = gpus([("", "", entry) for entry in cells.values()])
    lines = [
        f"{machines}; medians of rounds in which configs took turns; the slowest rank counts.",
        "",
        *heading([*head, "combinations timed, of all", "tuned in, s", "commit"]),
    ]
    for name, entry in cells.items():
        for which, found in entry["passes"].items():
            times = [f"{found[f'{one}_ms']:.3f}" for one in ("tuned", "best", "default")]
            times.insert(2, f"{found['slower_percent']:.1f}%")
            counts = f"{found['timed']} of {found['combinations']}"
            cells_of_row = [name, which, *times, counts, f"{entry['tune_sec']:.0f}", commit(entry)]
            lines.append(row(cells_of_row))
    return lines + others_configs(cells)


def others_configs(cells: dict[str, Any]) -> list[str]:
    """Of a sweep: cells with what was tuned for other cells."""
    head = ["layer", "tuned for", "both passes, ms", "with its own config", "longer by"]
    rows = []
    for name, entry in cells.items():
        by_config = entry.get("with_configs_of", {})
        for other, ms in by_config.items():
            if other != name:
                own, longer = by_config[name], 100 * (ms / by_config[name] - 1)
                rows.append(row([name, other, f"{ms:.3f}", f"{own:.3f}", f"{longer:.1f}%"]))
    return ["", *heading(head), *rows] if rows else []


def jax_step_table() -> list[str]:
    """A step in JAX beside the same calls on CuPy arrays."""
    cells = read(RESULTS / "jax_step.json")["cells"]
    machines = gpus([("", "", entry) for entry in cells.values()])
    lines = [
        f"{machines}; medians of rounds in turns, the slowest rank; a process for each GPU.",
        "",
        *heading(["layer", "JAX, us a step", "CuPy calls", "JAX over them", "JAX", "commit"]),
    ]
    for name, entry in cells.items():
        times = [f"{entry['times'][side]['us']['median']:,.0f}" for side in ("JAX", "calls")]
        over = f"{entry['overhead_percent']:.1f}%"
        lines.append(row([name.removesuffix(" L=1"), *times, over, entry["jax"], commit(entry)]))
    return lines


def link_table() -> list[str]:
    data = read(RESULTS / "link.json")
    machine, rates = data["machine"], data["gbps"]
    counts = sorted({int(n) for rate in rates.values() if isinstance(rate, dict) for n in rate})
    lines = [
        f"{data['ranks']} {machine['gpu']}, {machine['date']}, at {machine['commit']}; GB/s per "
        "GPU, by CTAs that move rows.",
        "",
        *heading(["", "its own choice", *map(str, counts)]),
    ]
    for name, found in rates.items():
        by_ctas = found if isinstance(found, dict) else {"": found}
        values = [by_ctas.get(count) for count in ("", *map(str, counts))]
        lines.append(row([name, *(f"{value:.0f}" if value else "" for value in values)]))
    hops = [f"{name} {value:.2f}" for name, value in data["us"].items()]
    return [*lines, "", f"Microseconds: {', '.join(hops)}."]


# ---- parts of tables -------------------------------------------------------------------------

Named = tuple[str, str, dict[str, Any]]  # cell, pass, entry


def entries_of(path: Path, only: str = "") -> Iterator[Named]:
    for name, passes in read(path).get("cells", {}).items():
        yield from ((name, which, e) for which, e in passes.items() if only in ("", which))


def peers(only: str = "") -> Iterator[Named]:
    """The entries of all files of several GPUs, those with most GPUs first."""
    for path in sorted(RESULTS.glob("peers_*.json"), reverse=True):
        yield from entries_of(path, only)


def rate(entry: dict[str, Any], contender: str) -> str:
    """TFLOP/s isolated, and sustained; of chunked, the best one and its number of chunks."""
    name = best(entry, "chunked") if contender == "chunked" else contender
    isolated = tflops(entry, name or "")
    if isolated is None:
        return "-"
    sustained = tflops(entry, name or "", sustained=True)
    text = f"{isolated:.0f}" + (f", {sustained:.0f}" if sustained else "")
    return f"{text} ({name.split()[-1]})" if name and contender == "chunked" else text


def summary(entry: dict[str, Any] | None) -> str:
    if entry is None:
        return "-"
    rates = [f"{tflops(entry, name) or 0:.0f}" for name in ("fused", "gemms")]
    return ", ".join([*rates, number(figures(entry), "over sequential")])


def step_memory(entry: dict[str, Any]) -> str:
    """Of fused and of sequential."""
    found = [step_gb(entry, name) for name in ("fused", "sequential")]
    if not any(found):
        return "-"
    return ", ".join("-" if gb is None else f"{gb:.2f}" for gb in found)


def number(found: dict[str, Any], name: str, form: str = ".2f") -> str:
    return format(found[name], form) if name in found else "-"


def hidden(found: dict[str, float]) -> str:
    """Without the GEMMs alone nothing is known."""
    return number(found, "hidden") if "hidden" in found or "efficiency" not in found else "little"


def commit(entry: dict[str, Any]) -> str:
    return str(entry["machine"]["commit"])


def gpus(entries: list[Named]) -> str:
    machines = [entry["machine"] for *_, entry in entries]
    names = sorted({machine["gpu"] for machine in machines})
    dates = sorted({machine["date"] for machine in machines})
    return f"{' and '.join(names)}, {' to '.join(dates[:1] + dates[1:][-1:])}"


def row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def heading(cells: list[str]) -> list[str]:
    return [row(cells), "|" + "---|" * len(cells)]


# ---- pages ---------------------------------------------------------------------------------------

TABLES: dict[str, Callable[[], list[str]]] = {
    "engine": engine_table,
    "peers": peers_table,
    "passes": passes_table,
    "overlap": overlap_table,
    "layers": layers_table,
    "end_to_end": end_to_end_table,
    "latency": latency_table,
    "small": small_table,
    "nodes": nodes_table,
    "jax_step": jax_step_table,
    "link": link_table,
    "sweep": sweep_table,
    "short": short_table,
}
PAGES = {
    "docs/benchmarks.md": (
        "engine",
        "peers",
        "passes",
        "overlap",
        "latency",
        "small",
        "nodes",
        "end_to_end",
        "jax_step",
        "layers",
        "sweep",
        "link",
    ),
    "README.md": ("short",),
}


def with_tables(text: str, names: tuple[str, ...]) -> str:
    """The text, with what lies between the marks of these tables made anew, where it has them."""
    for name in names:
        mark = re.compile(rf"(<!-- table: {name} -->\n).*?(\n<!-- end -->)", re.DOTALL)
        if mark.search(text):
            body = "\n".join(TABLES[name]())
            text = mark.sub(lambda found, body=body: found[1] + body + found[2], text)
    return text


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args(argv)
    for name, tables in PAGES.items():
        path = ROOT / name
        text = path.read_text()
        wanted = with_tables(text, tables)
        if not args.check:
            path.write_text(wanted)
        elif text != wanted:
            sys.exit(f"{name}: the tables are not those of benchmarks/results")


if __name__ == "__main__":
    main()
