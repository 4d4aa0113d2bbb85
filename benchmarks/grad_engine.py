"""Measure the backward forms of the grouped GEMM engine beside their peers on one GPU.

python -m benchmarks.grad_engine [--models mixtral-8x7b,...] [--rounds 15]

Equal groups of real rows; medians of TFLOP/s. "cublas" is one GEMM an expert. Beside them what the
layer's own forms take: "all": the down dgrad with dz, weighted_a and dweight; "fp32+" and "bf16+":
weight gradients added to float32 or bf16 ones. "bytes" are GB/s of "all", "copy" those of a copy.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from typing import Any

import cupy as cp
import numpy as np

from benchmarks.engine import BF16, EXPERTS, TOKENS, group_sizes, measure, tiles_of
from benchmarks.expert_gemm import ExpertGemm
from benchmarks.workloads import device_normal
from cometrt.cuda.dgrad import GroupedDgrad, GroupedDownDgrad, dgrad_n_tiles
from cometrt.cuda.engine import order_tiles, raster_group_of
from cometrt.cuda.wgrad import GroupedWgrad, Wgrad, WgradOrder
from cometrt.models import MODELS

Runs = dict[str, Any]


def torch_run(a: Any, b: Any, sizes: np.ndarray, *, wgrad: bool) -> Any:
    """torch._grouped_mm where it is there; its result has the layout of the others'."""
    try:
        import torch

        first, second = (torch.from_dlpack(x) for x in (a, b))
        first = first.t() if wgrad else first
        ends = torch.tensor(np.cumsum(sizes), dtype=torch.int32, device="cuda")
        stream = torch.cuda.ExternalStream(cp.cuda.get_current_stream().ptr)

        def run() -> None:
            with torch.cuda.stream(stream):
                run.out = torch._grouped_mm(first, second, offs=ends)  # type: ignore[attr-defined]

        run()
        return run
    except Exception as error:
        print(f"  no torch._grouped_mm: {error}")
        return None


def dgrad_runs(sizes: np.ndarray, inner: int, columns: int, *, down: bool = False) -> Runs:
    """out [rows, columns] = a [rows, inner] b[e] [inner, columns]."""
    tiles, cublas, engine = tiles_of(sizes), ExpertGemm(), GroupedDgrad()
    rows = int(tiles.offsets[-1])
    a, b = device_normal((rows, inner)), device_normal((len(sizes), inner, columns), inner**-0.5)
    out, other = cp.empty((rows, columns), BF16), cp.empty((rows, columns), BF16)
    group = raster_group_of(inner)
    order = order_tiles(tiles, dgrad_n_tiles(columns), raster_group=group)

    def by_cublas() -> None:
        for e, begin in enumerate(tiles.offsets[:-1]):
            of = slice(int(begin), int(begin + sizes[e]))
            cublas("NN", a[of], b[e], other[of])

    runs = {"engine": lambda: engine(a, b, out, order), "cublas": by_cublas}
    if rows == sizes.sum():
        runs["torch"] = torch_run(a, b, sizes, wgrad=False)
    compare(runs, out, other)
    if down:
        with_epilogue, z = GroupedDownDgrad("swiglu"), device_normal((rows, 2 * columns))
        weight = cp.random.random(rows, np.float32)
        dz, weighted_a = cp.empty_like(z), cp.empty_like(out)
        dweight = cp.empty((rows, dgrad_n_tiles(columns)), np.float32)
        runs["all"] = lambda: with_epilogue(a, b, z, weight, dz, weighted_a, dweight, order)
        read = a.nbytes + b.nbytes + z.nbytes
        runs["all"].nbytes = read + dz.nbytes + weighted_a.nbytes
    return runs


def wgrad_runs(sizes: np.ndarray, m: int, n: int) -> Runs:
    """out [e, m, n] = a_e^T b_e."""
    tiles, cublas, engine = tiles_of(sizes), ExpertGemm(), GroupedWgrad()
    rows, experts = int(tiles.offsets[-1]), len(sizes)
    a, b = device_normal((rows, m)), device_normal((rows, n))
    for e, end in enumerate(tiles.offsets[1:]):
        unused = slice(int(tiles.offsets[e] + sizes[e]), int(end))
        a[unused], b[unused] = 0, 0
    out, other = cp.empty((experts, m, n), BF16), cp.empty((experts, m, n), BF16)
    order = WgradOrder(experts, [(m, n)])

    def by_cublas() -> None:
        for e, begin in enumerate(tiles.offsets[:-1]):
            of = slice(int(begin), int(begin + sizes[e]))
            cublas("TN", a[of], b[of], other[e])

    runs = {"engine": lambda: engine([Wgrad(a, b, out)], tiles, order), "cublas": by_cublas}
    if rows == sizes.sum():
        runs["torch"] = torch_run(a, b, sizes, wgrad=True)
    compare(runs, out, other)
    for name, total in (("bf16+", out), ("fp32+", cp.zeros(out.shape, np.float32))):
        added = [Wgrad(a, b, total)]
        runs[name] = functools.partial(engine, added, tiles, order, accumulate=True)
    return runs


def copy_rate() -> float:
    """GB/s, read and written, of a copy between two large arrays."""
    source = cp.zeros(1 << 28, np.float32)
    target = cp.empty_like(source)
    times = measure({"copy": functools.partial(cp.copyto, target, source)}, 9)["copy"]
    return 2 * source.nbytes / statistics.median(times) / 1e6


def compare(runs: Runs, out: Any, other: Any) -> None:
    """Both results agree up to their rounding."""
    out.fill(np.nan)
    runs["engine"]()
    runs["cublas"]()
    some = slice(0, 4096) if out.ndim == 2 else slice(0, 2)
    found, expected = out[some].astype(np.float32), other[some].astype(np.float32)
    error = float(cp.linalg.norm(found - expected) / cp.linalg.norm(expected))
    if not error < 5e-3:
        raise SystemExit(f"wrong by {error:.2e}")


def own_forms(runs: Runs, times: dict[str, list[float]]) -> list[str]:
    """Times of the layer's own forms, as parts of the plain engine's."""
    median = {name: statistics.median(of) for name, of in times.items()}
    parts = [
        f"{name} {median[name] / median['engine']:.3f}"
        for name in ("all", "bf16+", "fp32+")
        if name in runs
    ]
    if "all" in runs:
        parts.append(f"bytes {runs['all'].nbytes / median['all'] / 1e6:.0f}")
    return parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    with cp.cuda.Stream(non_blocking=True):
        print(f"copy {copy_rate():.0f} GB/s")
        print(f"{'TFLOP/s':26s} engine cublas  torch | /best, time / engine's")
        for name in args.models.split(","):
            model = MODELS[name]
            experts, hidden = EXPERTS.get(name, model.num_experts), model.hidden
            inter = model.intermediate
            sizes = group_sizes(TOKENS.get(name, 16384) * model.topk, experts, 0.0)
            for form, runs_of, m, n in (
                ("down dgrad", functools.partial(dgrad_runs, down=True), hidden, inter),
                ("up dgrad", dgrad_runs, 2 * inter, hidden),
                ("down wgrad", wgrad_runs, hidden, inter),
                ("up wgrad", wgrad_runs, 2 * inter, hidden),
            ):
                runs = {k: run for k, run in runs_of(sizes, m, n).items() if run is not None}
                flops = 2.0 * float(sizes.sum()) * m * n
                times = measure(runs, args.rounds)
                rate = {k: flops / statistics.median(t) / 1e9 for k, t in times.items()}
                best = max(rate["cublas"], rate.get("torch", 0))
                print(
                    f"{name + ' ' + form:26s} {rate['engine']:6.0f} {rate['cublas']:6.0f} "
                    f"{rate.get('torch', 0):6.0f} | {rate['engine'] / best:5.3f}",
                    *own_forms(runs, times),
                    flush=True,
                )
                del runs
                cp.get_default_memory_pool().free_all_blocks()


if __name__ == "__main__":
    main()
