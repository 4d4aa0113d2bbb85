"""Measure a layer's forward on virtual ranks of one GPU, behind modelled links: the digital twin.

python benchmarks/layer.py [--out results.json] [--cells short|models|all] [--rounds 7]

Fused, sequential and the GEMMs alone take turns behind a gate on the device; a time is that of the
slowest rank. With --out, cells that the file has at this commit are not measured again. Known
biases: launches and hops weigh too little, and all ranks share one L2 cache and one DRAM.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cupy as cp
import numpy as np

import cometrt
from cometrt.models import MODELS
from cometrt.world.link import LINKS
from cometrt.world.partitions import gpu_sms, num_sms

EXPERTS = {"deepseek-v3": 64}  # what fits; others: all
CAPACITY_FACTOR = 1.25
WARM_UP = 2


@dataclasses.dataclass(frozen=True)
class Cell:
    """One point of the table; skew: coefficient of variation of the experts' loads."""

    model: str
    ranks: int = 8
    tp: int = 1
    tokens: int = 8192
    link: str | None = "h100"
    skew: float = 0.0
    order: str = "waves"

    def __str__(self) -> str:
        text = f"{self.model} W={self.ranks} TP={self.tp} T={self.tokens} link={self.link}"
        return (
            text
            + (f" skew={self.skew}" if self.skew else "")
            + (f" {self.order}" if self.order != "waves" else "")
        )

    @property
    def spec(self) -> cometrt.MoESpec:
        model = MODELS[self.model]
        return cometrt.MoESpec(
            hidden=model.hidden,
            intermediate=model.intermediate,
            num_experts=EXPERTS.get(self.model, model.num_experts),
            topk=model.topk,
            max_tokens=self.tokens,
            tp=self.tp,
            capacity_factor=CAPACITY_FACTOR * (1 + 3 * self.skew),
        )

    @property
    def flops(self) -> float:
        model = MODELS[self.model]
        return 6.0 * self.ranks * self.tokens * model.topk * model.hidden * model.intermediate


def cells(which: str) -> list[Cell]:
    if which == "short":
        return [Cell("qwen3-30b-a3b"), Cell("mixtral-8x7b")]
    found = [Cell(model) for model in MODELS]
    if which == "models":
        return found
    for model in MODELS:
        base = Cell(model)
        found += [dataclasses.replace(base, ranks=ranks) for ranks in (2, 4)]
        found += [dataclasses.replace(base, link=link) for link in ("h800", None)]
        found += [dataclasses.replace(base, tp=tp) for tp in (2, 4, 8)]
        found += [dataclasses.replace(base, tokens=tokens) for tokens in (1024, 2048, 4096)]
        found += [dataclasses.replace(base, skew=skew) for skew in (0.08, 0.256, 0.4)]
        found.append(dataclasses.replace(base, order="columns"))
    return found


def routing(cell: Cell) -> np.ndarray:
    """[W, T, K] int32: distinct experts, drawn with the loads that the skew says."""
    spec, rng = cell.spec, np.random.default_rng(0)
    z = rng.standard_normal(spec.num_experts)
    load = np.maximum(1 + cell.skew * (z - z.mean()) / z.std(), 0.01)
    noise = rng.gumbel(size=(cell.ranks, cell.tokens, spec.num_experts))
    noise += np.log(load / load.sum())
    return np.argpartition(-noise, spec.topk - 1, axis=2)[:, :, : spec.topk].astype(np.int32)


def crossing_bytes(cell: Cell, ids: np.ndarray) -> int:
    """Of the busiest direction of a rank's link, in dispatch; in combine they go back."""
    spec, size = cell.spec, cell.ranks
    experts = spec.num_experts // (size // spec.tp)
    wanted = np.zeros((size, size), np.int64)  # tokens [home, contributor]
    for home in range(size):
        for group in range(size // spec.tp):
            tokens = int(((ids[home] // experts) == group).any(axis=1).sum())
            wanted[home, group * spec.tp : (group + 1) * spec.tp] = tokens
    np.fill_diagonal(wanted, 0)
    return int(max(wanted.sum(axis=0).max(), wanted.sum(axis=1).max())) * 2 * spec.hidden


_GATE = r"""
extern "C" __global__ void gate(volatile int* open, int number) {
  unsigned long long begin, now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(begin));
  do {
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  } while (*open < number && now - begin < 5000000000ull);
}
"""


class Gate:
    """All ranks begin at once: each queues `close`, and its work; then one opens."""

    def __init__(self) -> None:
        self._memory = cp.cuda.alloc_pinned_memory(4)
        self._flag = np.frombuffer(self._memory, np.int32, 1)
        self._flag[0] = 0

    def close(self, number: int) -> None:
        cp.RawKernel(_GATE, "gate")((1,), (1,), (np.uint64(self._memory.ptr), np.int32(number)))

    def open(self, number: int) -> None:
        self._flag[0] = number


def random_bf16(shape: tuple[int, ...], scale: float = 1.0) -> Any:
    out = cp.empty(shape, _BF16)
    flat = out.reshape(-1)
    for begin in range(0, flat.size, 1 << 26):
        part = flat[begin : begin + (1 << 26)]
        part[...] = (cp.random.standard_normal(part.size, dtype=cp.float32) * scale).astype(_BF16)
    return out


_BF16 = Cell("mixtral-8x7b").spec.numpy_dtype


class Rank:
    """One rank's layers and arrays."""

    def __init__(self, world: cometrt.World, cell: Cell, ids: np.ndarray) -> None:
        spec, model = cell.spec, MODELS[cell.model]
        chunk = 512 if cell.order == "columns" else 256
        config = cometrt.TileConfig(layer1_order=cell.order, chunk=chunk)
        self.world = world
        self.layers = {
            mode: cometrt.MoELayer(world, spec, mode, config=config)
            for mode in ("fused", "sequential")
        }
        cp.random.seed(world.rank)
        geometry = self.layers["fused"].geometry
        rng = np.random.default_rng(world.rank)
        self.x = self.layers["fused"].buffer()[: cell.tokens]
        self.x[...] = random_bf16(self.x.shape)
        self.weights = (
            random_bf16(geometry.w_up_shape, model.hidden**-0.5),
            random_bf16(geometry.w_down_shape, model.intermediate**-0.5),
        )
        self.ids = cp.asarray(ids[world.rank])
        self.topk_weights = cp.asarray(rng.random(self.ids.shape, np.float32) + 0.5)
        self.y = {mode: cp.full(self.x.shape, np.nan, _BF16) for mode in self.layers}
        self.gemms = self._record_gemms()

    def forward(self, mode: str) -> None:
        self.layers[mode].forward(
            self.x, self.ids, self.topk_weights, *self.weights, out=self.y[mode]
        )

    def _record_gemms(self) -> Any:
        """The sequential layer's GEMMs of a call, with their data in place."""
        engine, calls = self.layers["sequential"]._executor._engine, []
        real = engine.forward

        def record(*arguments: Any) -> None:
            calls.append(arguments)
            real(*arguments)

        engine.forward = record
        self.forward("sequential")
        engine.forward = real
        self.layers["sequential"].synchronize()
        return lambda: real(*calls[0])

    def check(self) -> float:
        """Relative distance of the modes' results, both poisoned before."""
        for mode in self.layers:
            self.y[mode].fill(np.nan)
            self.forward(mode)
            self.layers[mode].synchronize()
        one, other = (self.y[mode].astype(cp.float32) for mode in ("fused", "sequential"))
        return float(cp.linalg.norm(one - other) / cp.linalg.norm(other))


def measure(cell: Cell, rounds: int) -> dict[str, Any]:
    ids, gate = routing(cell), Gate()

    def fn(world: cometrt.World) -> tuple[dict[str, list[float]], float, int]:
        rank = Rank(world, cell, ids)
        distance = rank.check()
        stream, number = cp.cuda.get_current_stream(), 0
        gate.close(0)
        stream.synchronize()
        times: dict[str, list[float]] = {"fused": [], "sequential": [], "gemms": []}
        for index in range(rounds + WARM_UP):
            for name in times:
                number += 1
                world.barrier()
                gate.close(number)
                begin, end = cp.cuda.Event(), cp.cuda.Event()
                begin.record()
                if name == "gemms":
                    rank.gemms()
                else:
                    rank.forward(name)
                end.record()
                world.barrier()
                if world.rank == 0:
                    gate.open(number)
                end.synchronize()
                if index >= WARM_UP:
                    times[name].append(cp.cuda.get_elapsed_time(begin, end))
        for layer in rank.layers.values():
            layer.close()
        return times, distance, num_sms()

    results = cometrt.spawn(fn, cell.ranks, "cuda", link=cell.link, timeout_sec=20)
    distance = max(distance for _, distance, _ in results)
    if not distance < 1e-2:
        raise SystemExit(f"{cell}: fused is {distance:.1e} from sequential")
    slowest = {
        name: [max(run) for run in zip(*(times[name] for times, _, _ in results), strict=True)]
        for name in results[0][0]
    }
    crossing = crossing_bytes(cell, ids)
    sms = results[0][2]
    rate = None if cell.link is None else LINKS[cell.link] * sms / gpu_sms() * 1e9
    return figures(cell, slowest, 0.0 if rate is None else 1e3 * crossing / rate) | {
        "sms": sms,
        "crossing_bytes": crossing,
        "distance": distance,
    }


def figures(cell: Cell, slowest: dict[str, list[float]], crossing_ms: float) -> dict[str, Any]:
    """crossing_ms: D, and C, which is the same."""
    ms = {name: spread(times) for name, times in slowest.items()}
    fused, comp = ms["fused"]["median"], ms["gemms"]["median"]
    found: dict[str, Any] = {
        "ms": ms,
        "link_ms": crossing_ms,
        "tflops": {name: cell.flops / values["median"] / 1e9 for name, values in ms.items()},
        "efficiency": max(comp, crossing_ms) / fused,
        "speedup_over_sequential": ms["sequential"]["median"] / fused,
    }
    if 2 * crossing_ms >= 0.3 * comp:
        found["hidden_share"] = 1 - (fused - comp) / (2 * crossing_ms)
    return found


def spread(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    tenth = len(ordered) // 10
    return {
        "median": statistics.median(ordered),
        "p10": ordered[tenth],
        "p90": ordered[-1 - tenth],
    }


def line(cell: Cell, found: dict[str, Any]) -> str:
    rate = found["tflops"]
    hidden = f"{found['hidden_share']:.2f}" if "hidden_share" in found else "   -"
    return (
        f"{cell!s:46s} {rate['fused']:6.0f} {rate['sequential']:6.0f} {rate['gemms']:6.0f} | "
        f"{found['ms']['fused']['median']:7.2f} {found['link_ms']:6.2f} | "
        f"{found['speedup_over_sequential']:5.2f} {found['efficiency']:5.2f} {hidden}"
    )


def machine() -> dict[str, Any]:
    properties = cp.cuda.runtime.getDeviceProperties(0)
    return {
        "gpu": properties["name"].decode(),
        "driver": cp.cuda.runtime.driverGetVersion(),
        "date": datetime.date.today().isoformat(),
        "commit": os.environ.get("COMETRT_COMMIT")
        or subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--cells", choices=["short", "models", "all"], default="short")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    here, results, skipped = machine(), {}, []
    if args.out and args.out.exists():
        before = json.loads(args.out.read_text())
        if before["machine"]["commit"] == here["commit"]:
            results = before["cells"]
    print(
        f"{'TFLOP/s in sum':46s}  fused sequen.  GEMMs | fused ms  link ms | over sequential, "
        "efficiency, hidden share"
    )
    for cell in cells(args.cells):
        if str(cell) not in results:
            try:
                results[str(cell)] = measure(cell, args.rounds)
            except (cp.cuda.memory.OutOfMemoryError, cometrt.CapacityError) as error:
                skipped.append(str(cell))
                print(f"{cell!s:46s} skipped: {type(error).__name__}", flush=True)
                continue
            finally:
                cp.get_default_memory_pool().free_all_blocks()
        print(line(cell, results[str(cell)]), flush=True)
        if args.out:
            written = {"machine": here, "cells": results, "skipped": skipped}
            args.out.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
