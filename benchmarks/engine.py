"""Measure the grouped GEMM engine beside its peers on one GPU; print a table and write JSON.

    python -m benchmarks.engine [--pass forward,backward] [--models mixtral-8x7b,...]
                                [--rounds 15] [--out engine.json]

In every round all contenders of a shape run in a random order, one at a time (isolated). Results
are medians over rounds. Data is random. TFLOP/s count real rows only, without padding rows. Shapes
that the file already has of this machine and commit stay in it.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")

import cupy as cp

from benchmarks.engine_backward import Dgrad, DownDgrad, WeightGradient
from benchmarks.engine_forms import BF16, REPEATS, Groups, RowsForm, Run, copy_rate, measure
from cometrt.bench.records import machine, read, spread, write
from cometrt.cuda.engine import GroupedGemm, order_tiles, raster_group_of
from cometrt.models import MODELS

TOKENS = {"mixtral-8x7b": 8192, "phi-3.5-moe": 8192}  # others: 16384
EXPERTS = {"deepseek-v3": 32}  # as many as fit; others: all of the model
FORMS = {
    "forward": ("up", "down"),
    "backward": ("down dgrad", "up dgrad", "down wgrad", "up wgrad"),
}
OWN = (
    "swiglu",
    "swiglu+z",
    "all",
    "fp32",
    "fp32+",
    "bf16+",
)  # contenders with an epilogue that only the layer has
MOST_ERROR = 1.1  # largest relative error, as a multiple of cuBLAS's


class Down(RowsForm):
    """A forward's GEMM without activation: out [rows, n] = a [rows, k] b[expert]^T, b [n, k]."""

    def engine(
        self, groups: Groups, b: Any, activation: str | None = None, *, write_z: bool = False
    ) -> Run:
        gemm, (_, columns, k) = GroupedGemm(activation, write_z=write_z), b.shape
        n_tiles, group = gemm.num_n_tiles(columns), raster_group_of(k)
        order, rows = order_tiles(groups.tiles, n_tiles, raster_group=group), len(groups.rows)
        out = cp.empty((rows, columns // 2 if activation else columns), BF16)
        z = cp.empty((rows, columns), BF16) if write_z else None
        run: Run = lambda: gemm(groups.rows, b, out, order, z=z)  # noqa: E731
        run.out = out
        return run


class Up(Down):
    """The up GEMM: as `Down`, and also with activation, and with activation and z."""

    def runs(self) -> dict[str, Run | None]:
        return super().runs() | {
            "swiglu": self.engine(self.equal, self.b, "swiglu"),
            "swiglu+z": self.engine(self.equal, self.b, "swiglu", write_z=True),
        }


def form_of(name: str, form: str) -> Any:
    """A form (a GEMM of a layer, one of FORMS) with the shapes of a model."""
    model, experts = MODELS[name], EXPERTS.get(name, MODELS[name].num_experts)
    rows, hidden, inter = TOKENS.get(name, 16384) * model.topk, model.hidden, model.intermediate
    kind, *extents = {
        "up": (Up, 2 * inter, hidden),
        "down": (Down, hidden, inter),
        "down dgrad": (DownDgrad, inter, hidden),
        "up dgrad": (Dgrad, hidden, 2 * inter),
        "down wgrad": (WeightGradient, hidden, inter),
        "up wgrad": (WeightGradient, 2 * inter, hidden),
    }[form]
    return kind(rows, experts, *extents)  # type: ignore[operator]


def measure_form(label: str, form: Any, rounds: int) -> dict[str, Any]:
    """Check and time all contenders of a form. Returns an entry of the file.

    Raises:
        SystemExit: if a result is wrong.
    """
    runs = {name: run for name, run in form.runs().items() if run is not None}
    errors = form.errors(runs)
    for name, error in errors.items():
        if not error <= MOST_ERROR * errors["batched"]:
            raise SystemExit(f"{label}: {name} is wrong, relative error {error:.2e}")
    times = measure(runs, rounds)
    equal = form.equal[0] if isinstance(form.equal, tuple) else form.equal
    return {
        "rows": int(equal.sizes.sum()), "experts": len(equal.sizes), **form.facts,
        "tflops": {
            m: form.flops * (REPEATS if m == "partitions" else 1) / statistics.median(t) / 1e9
            for m, t in times.items()
        },
        "ms": {m: spread(t) for m, t in times.items()},
        "copy_ms": {m: size / copy_rate() for m, size in form.bytes_of().items()},
        "error": errors,
    }  # fmt: skip


def own_form(result: dict[str, Any], name: str) -> str:
    """The time of one of OWN, divided by that of the plain GEMM.

    If copying as many bytes takes longer than the plain GEMM, also divided by that copy's time.
    """
    plain, time = (result["ms"][of]["median"] for of in ("engine", name))
    copied = result["copy_ms"].get(name, 0.0)
    bound = f" (copy x{time / copied:.3f})" if copied > plain else ""
    return f"{name} x{time / plain:.3f}{bound}"


def line(label: str, result: dict[str, Any]) -> str:
    """An entry as a line of the table."""
    rate = result["tflops"]
    best = max(rate.get("torch", 0), rate["batched"])
    return (
        f"{label:24s} {rate['engine']:6.0f} {rate.get('torch', 0):6.0f} {rate['batched']:6.0f} "
        f"{rate['dense']:6.0f} | {rate['engine'] / best:5.3f} {rate['engine'] / rate['dense']:5.3f}"
        f" | skew {100 * (1 - rate['skewed'] / rate['engine']):4.1f}% "
        f"x{rate['skewed'] / rate.get('torch skewed', math.inf):4.2f} | parts "
        f"{rate['partitions'] / rate['engine'] * 132 / 128:5.3f} | "
        + " ".join(own_form(result, name) for name in OWN if name in rate)
        + f" | err {result['error']['engine']:.2e} {result['error']['batched']:.2e}"
    )


def earlier(path: Path | None, here: dict[str, Any]) -> dict[str, Any]:
    """The shapes of an earlier file, if it is of this machine and commit."""
    found = read(path) if path else {}
    return dict(found["shapes"]) if found.get("machine") == here else {}


def measured(args: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """Label and entry of each model and form that was asked for."""
    for name in args.models:
        for form in (form for which in args.passes for form in FORMS[which]):
            label = f"{name} {form}"
            yield label, measure_form(label, form_of(name, form), args.rounds)
            gc.collect()  # closures of runs are cycles
            cp.get_default_memory_pool().free_all_blocks()


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    def some_of(known: Any) -> Any:
        def names(text: str) -> list[str]:
            if unknown := [name for name in text.split(",") if name not in known]:
                raise argparse.ArgumentTypeError(f"{unknown} not among {', '.join(known)}")
            return text.split(",")

        return names

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pass", dest="passes", type=some_of(FORMS), default=list(FORMS))
    parser.add_argument("--models", type=some_of(MODELS), default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path)
    return parser.parse_args(argv)


def main() -> None:
    args = parse()
    print(
        f"{'TFLOP/s':24s} engine  torch batchd  dense | /best /dense | skew, x torch | "
        "16-SM parts | time of own forms | error, cuBLAS's"
    )
    here, ratios = machine(), []
    results = earlier(args.out, here)
    with cp.cuda.Stream(non_blocking=True):
        for label, result in measured(args):
            rate = result["tflops"]
            ratios.append(rate["engine"] / max(rate.get("torch", 0), rate["batched"]))
            results[label] = result
            print(line(label, result), flush=True)
            write(args.out, {"machine": here, "shapes": results})
    print(f"geometric mean over the better peer: {statistics.geometric_mean(ratios):.3f}")


if __name__ == "__main__":
    main()
