"""Measure the backward forms of the grouped GEMM engine beside their peers on one GPU.

python -m benchmarks.grad_engine [--models mixtral-8x7b,...] [--rounds 15] [--variants]

Equal groups of real rows; medians of TFLOP/s. "cublas" is one GEMM an expert. Beside them what the
layer's own forms take: "all": the down dgrad with dz, weighted_a and dweight; "fp32+" and "bf16+":
weight gradients added to float32 or bf16 ones. "bytes" are GB/s of "all", "copy" those of a copy.

--variants measures "all" alone, as built with each of VARIANTS. Their results are compared first.
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
from cometrt.kernels.constants import BLOCK_K
from cometrt.models import MODELS

Runs = dict[str, Any]

VARIANTS: dict[str, tuple[tuple[str, int], ...]] = {  # macros of the down dgrad
    "one block": (),
    "two blocks": (("COVER", 1),),
    "in turns": (("COVER", 2),),
    "lean": (("LEAN_STEP", 1),),
    "lean, two blocks": (("COVER", 1), ("LEAN_STEP", 1)),
    "lean, in turns": (("COVER", 2), ("LEAN_STEP", 1)),
    "across, two blocks": (("COVER", 1), ("LEAN_STEP", 2)),
    "across, in turns": (("COVER", 2), ("LEAN_STEP", 2)),
}
# Compared on these: tiles that are not full; fewer K blocks than steps, one a step, two, four.
RAGGED = np.array([0, 1, 63, 64, 65, 127, 128, 129, 300, 1000, 700])
RAGGED_SHAPES = ((528, 272), (1040, 400), (2064, 1024), (4112, 80))  # K, columns
VARIANT_MODELS = "qwen3-30b-a3b,mixtral-8x7b,qwen2-moe"
TENSOR_CYCLES = 1024  # of a K block, at the tensor cores' full rate


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
        (runs["all"],) = down_runs(a, b, out, order, {"all": ()}).values()
    return runs


def down_runs(a: Any, b: Any, out: Any, order: Any, variants: dict[str, Any]) -> Runs:
    """The down dgrad with dz, weighted_a and dweight, built with each variant's macros. All write
    the same arrays."""
    (rows, columns), weight = out.shape, cp.random.random(len(a), np.float32)
    z = device_normal((rows, 2 * columns))
    results = (
        cp.empty_like(z), cp.empty_like(out), cp.empty((rows, dgrad_n_tiles(columns)), np.float32)
    )  # fmt: skip

    def run_of(macros: Any) -> Any:
        engine = GroupedDownDgrad("swiglu", macros=macros)
        run: Any = lambda: engine(a, b, z, weight, *results, order)  # noqa: E731
        run.nbytes = sum(array.nbytes for array in (a, b, z, *results[:2]))
        run.results = results
        return run

    return {name: run_of(macros) for name, macros in variants.items()}


def compare_variants(runs: Runs) -> dict[str, float]:
    """All have the first one's bits in dz and weighted_a. Returns their errors of dweight, whose
    sums have another order."""
    expected: list[Any] = []
    errors = {}
    for name, run in runs.items():
        for array in run.results:
            array.fill(np.nan)
        run()
        expected = expected or [array.copy() for array in run.results]
        for what, found, wanted in zip(("dz", "weighted_a"), run.results, expected, strict=False):
            if not bool((found.view(np.uint16) == wanted.view(np.uint16)).all()):
                raise SystemExit(f"{name}: {what} differs")
        norm = cp.linalg.norm
        errors[name] = float(norm(run.results[2] - expected[2]) / norm(expected[2]))
        if not errors[name] < 1e-6:
            raise SystemExit(f"{name}: dweight is wrong by {errors[name]:.1e}")
    return errors


def variant_runs(sizes: np.ndarray, inner: int, columns: int) -> tuple[Runs, Any]:
    """Each variant; the plain dgrad."""
    tiles, engine, group = tiles_of(sizes), GroupedDgrad(), raster_group_of(inner)
    a = device_normal((int(tiles.offsets[-1]), inner))
    b = device_normal((len(sizes), inner, columns), inner**-0.5)
    out = cp.empty((len(a), columns), BF16)
    order = order_tiles(tiles, dgrad_n_tiles(columns), raster_group=group)
    plain = functools.partial(engine, a, b, out, order)
    return down_runs(a, b, out, order, VARIANTS), plain


def measure_variants(names: str, rounds: int) -> None:
    """A table: each variant's time over that of the plain dgrad, and over the longer of this one
    and its bytes at the rate of a copy; the tensor cores' idle cycles that it adds to a tile."""
    for inner, columns in RAGGED_SHAPES:
        compare_variants(variant_runs(RAGGED, inner, columns)[0])
    rate = copy_rate()
    print(f"copy {rate:.0f} GB/s\n{'':36s}   ms  /plain /limit  cycles  dweight")
    for name in names.split(","):
        model = MODELS[name]
        sizes = group_sizes(TOKENS.get(name, 16384) * model.topk, model.num_experts, 0.0)
        runs, plain = variant_runs(sizes, model.hidden, model.intermediate)
        errors = compare_variants(runs)
        times = measure({**runs, "plain": plain}, rounds)
        median = {variant: statistics.median(of) for variant, of in times.items()}
        unit, num_bytes = median["plain"], runs["one block"].nbytes
        limit = max(unit, num_bytes / rate / 1e6)
        print(f"{name + ' plain':36s} {unit:6.3f}         limit {limit:6.3f} ms")
        for variant, error in errors.items():
            time = median[variant]
            cycles = (time / unit - 1) * (model.hidden / BLOCK_K) * TENSOR_CYCLES
            print(
                f"{name + ' ' + variant:36s} {time:6.3f} {time / unit:6.3f} {time / limit:6.3f} "
                f"{cycles:7.0f}  {error:.1e}",
                flush=True,
            )
        del runs, plain
        cp.get_default_memory_pool().free_all_blocks()


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
    parser.add_argument("--models")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--variants", action="store_true")
    args = parser.parse_args()
    with cp.cuda.Stream(non_blocking=True):
        if args.variants:
            measure_variants(args.models or VARIANT_MODELS, args.rounds)
            return
        print(f"copy {copy_rate():.0f} GB/s")
        print(f"{'TFLOP/s':26s} engine cublas  torch | /best, time / engine's")
        for name in (args.models or ",".join(MODELS)).split(","):
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
