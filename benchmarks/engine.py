"""Measure the grouped GEMM engine beside its peers on one GPU; print a table and write JSON.

python benchmarks/engine.py [--out results.json] [--models mixtral-8x7b,...] [--rounds 15]

All contenders of a shape take turns in every round; medians. Random data, real rows only.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import random
import statistics
import sys
import types
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cupy as cp
import ml_dtypes
import numpy as np

from benchmarks.files import machine, write
from benchmarks.layer_cells import spread
from cometrt.cuda.engine import GroupedGemm, order_tiles, raster_group_of
from benchmarks.expert_gemm import ExpertGemm
from cometrt.models import MODELS
from cometrt.world.partitions import split_gpu, use_partition

BF16 = np.dtype(ml_dtypes.bfloat16)
TOKENS = {"mixtral-8x7b": 8192, "phi-3.5-moe": 8192}  # others: 16384
EXPERTS = {"deepseek-v3": 32}  # what fits; others: all
SKEW = 0.256
BLOCK_M = 128
PARTITIONS, REPEATS = 8, 4


def random_bf16(*shape: int, scale: float = 1.0) -> Any:
    out = cp.empty(shape, BF16)
    flat = out.reshape(-1)
    for begin in range(0, flat.size, 1 << 28):
        part = flat[begin : begin + (1 << 28)]
        part[...] = (cp.random.standard_normal(part.size, np.float32) * scale).astype(BF16)
    return out


def group_sizes(rows: int, experts: int, skew: float) -> np.ndarray:
    """Rows of each expert; `skew` is the coefficient of variation of the loads."""
    z = np.random.default_rng(0).standard_normal(experts)
    z = (z - z.mean()) / z.std()
    shares = np.maximum(1 + skew * z, 0) / experts
    sizes = np.floor(shares / shares.sum() * rows).astype(np.int64)
    sizes[0] += rows - sizes.sum()
    return sizes


def tiles_of(sizes: np.ndarray) -> Any:
    num_tiles = -(-sizes // BLOCK_M)
    offsets = np.concatenate([[0], np.cumsum(num_tiles)]) * BLOCK_M
    tables = {
        "tile_order": np.arange(num_tiles.sum()),
        "num_tiles": np.array([num_tiles.sum()]),
        "tile_expert": np.repeat(np.arange(len(sizes)), num_tiles),
        "expert_offsets": offsets,
        "expert_rows": sizes,
    }
    on_gpu = {name: cp.asarray(table.astype(np.int32)) for name, table in tables.items()}
    return types.SimpleNamespace(**on_gpu, offsets=offsets)


class Groups:
    """Rows of a for all experts, padded to M-tiles as the layer keeps them."""

    def __init__(self, sizes: np.ndarray, inner: int) -> None:
        self.sizes, self.tiles = sizes, tiles_of(sizes)
        self.a = cp.zeros((int(self.tiles.offsets[-1]), inner), BF16)
        for begin, size in zip(self.tiles.offsets[:-1], sizes, strict=True):
            self.a[begin : begin + size] = random_bf16(int(size), inner)

    def real_rows(self) -> Any:
        """Without padding, as other libraries want them."""
        parts = zip(self.tiles.offsets[:-1], self.sizes, strict=True)
        return cp.concatenate([self.a[begin : begin + size] for begin, size in parts])


def engine_run(groups: Groups, b: Any, activation: str | None, write_z: bool) -> Any:
    gemm = GroupedGemm(activation, write_z=write_z)
    group = GROUP or raster_group_of(b.shape[2])
    turns = order_tiles(groups.tiles, gemm.num_n_tiles(b.shape[1]), raster_group=group)
    rows, columns = len(groups.a), b.shape[1]
    out = cp.empty((rows, columns // 2 if activation else columns), BF16)
    z = cp.empty((rows, columns), BF16) if write_z else None
    run = lambda: gemm(groups.a, b, out, turns, z=z)  # noqa: E731
    run.out = out
    return run


def partitions_run(groups: Groups, b: Any) -> Any:
    """The experts dealt to eight partitions of 16 SMs, all busy at once, `REPEATS` times in a row:
    what it takes to start and join eight streams is not what is measured."""
    parts = split_gpu(PARTITIONS)
    jobs: list[Any] = []
    experts = len(b) // PARTITIONS
    for i, part in enumerate(parts):
        mine = slice(i * experts, (i + 1) * experts)
        begin, end = (int(groups.tiles.offsets[j]) for j in (mine.start, mine.stop))
        a = groups.a[begin:end]
        out = cp.empty((end - begin, b.shape[1]), BF16)
        tiles = tiles_of(groups.sizes[mine])
        cp.cuda.Device().synchronize()  # they are there before another stream reads them
        with use_partition(part):
            gemm = GroupedGemm(None)
            columns = gemm.num_n_tiles(b.shape[1])
            turns = order_tiles(tiles, columns, raster_group=raster_group_of(b.shape[2]))
        jobs.append((part, gemm, a, b[mine], out, turns))
    cp.cuda.Device().synchronize()
    ended = [cp.cuda.Event(disable_timing=True) for _ in parts]

    def run() -> None:
        current = cp.cuda.get_current_stream()
        begin = current.record()
        for (part, gemm, a, b_part, out, turns), event in zip(jobs, ended, strict=True):
            part.stream.wait_event(begin)
            with use_partition(part):
                for _ in range(REPEATS):
                    gemm(a, b_part, out, turns)
            event.record(part.stream)
            current.wait_event(event)

    return run


def dense_run(rows: int, b: Any) -> Any:
    gemm = ExpertGemm()
    a = random_bf16(rows, b.shape[2])
    out = cp.empty((rows, b.shape[1]), BF16)
    return lambda: gemm("NT", a, b[0], out)


def batched_run(groups: Groups, b: Any) -> Any:
    """cuBLAS, equal groups only."""
    from cupy.cuda import device
    from cupy_backends.cuda.libs import cublas

    handle, rows = device.get_cublas_handle(), int(groups.sizes[0])
    experts, columns, inner = b.shape
    out = cp.empty((experts * rows, columns), BF16)
    one, zero = np.ones(1, np.float32), np.zeros(1, np.float32)

    def run() -> None:
        cublas.setStream(handle, cp.cuda.get_current_stream().ptr)
        cublas.gemmStridedBatchedEx(
            handle, cublas.CUBLAS_OP_T, cublas.CUBLAS_OP_N, columns, rows, inner, one.ctypes.data,
            b.data.ptr, 14, inner, columns * inner, groups.a.data.ptr, 14, inner, rows * inner,
            zero.ctypes.data, out.data.ptr, 14, columns, rows * columns, experts, 68, -1,
        )  # fmt: skip

    run()
    run.out = out
    return run


def torch_run(groups: Groups, b: Any) -> Any:
    try:
        import torch

        a = torch.from_dlpack(groups.real_rows())
        weights = torch.from_dlpack(b).transpose(-2, -1)
        ends = torch.tensor(np.cumsum(groups.sizes), dtype=torch.int32, device="cuda")
        stream = torch.cuda.ExternalStream(cp.cuda.get_current_stream().ptr)

        def run() -> None:
            with torch.cuda.stream(stream):
                run.out = torch._grouped_mm(a, weights, offs=ends)

        run()
        return run
    except Exception as error:
        print(f"  no torch._grouped_mm: {error}")
        return None


def check(run: Any, groups: Groups, b: Any, *, padded: bool) -> float:
    """Relative error of some rows of some experts against float64."""
    if padded:  # ours: what is not written shows
        run.out.fill(float("nan"))
    run()
    out, worst = run.out, 0.0
    packed = np.concatenate([[0], np.cumsum(groups.sizes)])
    for e in {0, len(b) // 2, len(b) - 1}:
        begin, size = int(groups.tiles.offsets[e]), int(groups.sizes[e])
        picks = np.unique(np.concatenate([np.arange(size)[:40], np.arange(size)[-40:]]))
        if not size:
            continue
        at = picks + (begin if padded else int(packed[e]))
        got = cp.asarray(out)[cp.asarray(at)].astype(np.float64)
        want = groups.a[cp.asarray(begin + picks)].astype(np.float64) @ b[e].astype(np.float64).T
        worst = max(worst, float(cp.linalg.norm(got - want) / cp.linalg.norm(want)))
    return worst


_GATE = r"""
extern "C" __global__ void gate(unsigned long long nanoseconds) {
  unsigned long long begin, now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(begin));
  do { asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now)); } while (now - begin < nanoseconds);
}
"""


@functools.cache
def _gate() -> Any:
    return cp.RawKernel(_GATE, "gate")


def hold_back() -> None:
    """The GPU waits while the host gets ahead, so that what is timed starts at once."""
    _gate()((1,), (1,), (np.uint64(1_000_000),))


def measure(runs: dict[str, Any], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each, taking turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    order = random.Random(0)
    for index in range(rounds + 2):
        # The chip's power budget remembers who ran before: nobody keeps a neighbour.
        for name, run in order.sample(list(runs.items()), len(runs)):
            hold_back()
            begin, end = cp.cuda.Event(), cp.cuda.Event()
            begin.record()
            run()
            end.record()
            end.synchronize()
            if index >= 2:
                times[name].append(cp.cuda.get_elapsed_time(begin, end))
    return times


def shapes(names: list[str]) -> Any:
    for name in names:
        model = MODELS[name]
        tokens = TOKENS.get(name, 16384)
        experts = EXPERTS.get(name, model.num_experts)
        hidden, inter, rows = model.hidden, model.intermediate, tokens * model.topk
        yield f"{name} up", rows, experts, 2 * inter, hidden
        yield f"{name} down", rows, experts, hidden, inter


def measure_shape(label: str, rows: int, experts: int, n: int, k: int, rounds: int) -> dict:
    b = random_bf16(experts, n, k, scale=k**-0.5)
    equal = Groups(group_sizes(rows, experts, 0.0), k)
    skewed = Groups(group_sizes(rows, experts, SKEW), k)
    runs = {
        "engine": engine_run(equal, b, None, False),
        "torch": torch_run(equal, b),
        "batched": batched_run(equal, b),
        "dense": dense_run(rows, b),
        "skewed": engine_run(skewed, b, None, False),
        "torch skewed": torch_run(skewed, b),
        "partitions": partitions_run(equal, b),
    }
    if label.endswith("up"):
        runs["swiglu"] = engine_run(equal, b, "swiglu", False)
        runs["swiglu+z"] = engine_run(equal, b, "swiglu", True)
    runs = {name: run for name, run in runs.items() if run is not None}
    errors = {
        "engine": check(runs["engine"], equal, b, padded=True),
        "skewed": check(runs["skewed"], skewed, b, padded=True),
        "batched": check(runs["batched"], equal, b, padded=False),
    }
    for name in ("engine", "skewed"):
        if not errors[name] <= 1.1 * errors["batched"]:
            raise SystemExit(f"{label}: {name} is wrong, relative error {errors[name]:.2e}")
    times = measure(runs, rounds)
    flops = 2.0 * rows * n * k
    return {
        "rows": rows, "experts": experts, "n": n, "k": k,
        "tflops": {
            m: flops * (REPEATS if m == "partitions" else 1) / statistics.median(t) / 1e9
            for m, t in times.items()
        },
        "ms": {m: spread(t) for m, t in times.items()},
        "error": errors,
    }  # fmt: skip


def line(label: str, result: dict) -> str:
    rate = result["tflops"]
    best = max(rate.get("torch", 0), rate["batched"])
    cost = {m: 100 * (rate["engine"] / rate[m] - 1) for m in ("swiglu", "swiglu+z") if m in rate}
    return (
        f"{label:20s} {rate['engine']:6.0f} {rate.get('torch', 0):6.0f} {rate['batched']:6.0f} "
        f"{rate['dense']:6.0f} | {rate['engine'] / best:5.3f} {rate['engine'] / rate['dense']:5.3f}"
        f" | skew {100 * (1 - rate['skewed'] / rate['engine']):4.1f}% "
        f"x{rate['skewed'] / rate.get('torch skewed', math.inf):4.2f} | parts "
        f"{rate['partitions'] / rate['engine'] * 132 / 128:5.3f} | "
        + " ".join(f"{m} {c:4.1f}%" for m, c in cost.items())
        + f" | err {result['error']['engine']:.2e} {result['error']['batched']:.2e}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--raster-group", type=int, help="of the engine's order; default: its own")
    args = parser.parse_args()
    global GROUP
    GROUP = args.raster_group
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    print(
        f"{'TFLOP/s':20s} engine  torch batchd  dense | /best /dense | skew, x torch | "
        "16-SM parts | activation | error, cuBLAS's"
    )
    results, here = {}, machine()
    with cp.cuda.Stream(non_blocking=True):
        for label, *shape in shapes(args.models.split(",")):
            results[label] = measure_shape(label, *shape, args.rounds)
            cp.get_default_memory_pool().free_all_blocks()
            print(line(label, results[label]), flush=True)
            write(args.out, {"machine": here, "shapes": results})
    ratios = [
        r["tflops"]["engine"] / max(r["tflops"].get("torch", 0), r["tflops"]["batched"])
        for r in results.values()
    ]
    print(f"geometric mean over the better peer: {statistics.geometric_mean(ratios):.3f}")


if __name__ == "__main__":
    main()
