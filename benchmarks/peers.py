"""Measure a layer's forward on GPUs that are peers, beside NCCL; or, with --link, the same cells on
virtual ranks of one GPU, to see whether the digital twin tells the truth.

python benchmarks/peers.py [--ranks W] [--gbps 380 [--link]] [--out results.json]
                           [--models mixtral-8x7b,...] [--tokens 8192] [--rounds 9]
                           [--like peers.json]

TFLOP/s per GPU, of the slowest rank; of virtual ranks, all in sum. --gbps: of the link, each way:
what the computed times of dispatch and combine rest on, and with --link the modelled link's.
The fused layer has the config that a layer gets by itself; with --like, that of the file's cell.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cupy as cp

import cometrt
from benchmarks.files import machine, read, write
from benchmarks.layer_cells import Cell, crossing_bytes, figures, routing
from benchmarks.layer_rank import Gate, Rank, relative_distance, take_turns
from benchmarks.nccl.exchange import Nccl, NcclForward
from cometrt.models import MODELS
from cometrt.world.link import LINKS
from cometrt.world.partitions import gpu_sms, num_sms

SMALL_FIRST = ("qwen3-30b-a3b", "qwen2-moe", "phi-3.5-moe", "mixtral-8x7b", "deepseek-v3")
LINK = "given"  # name of the link that --gbps describes
assert set(SMALL_FIRST) == set(MODELS)


def measure(
    cell: Cell, rounds: int, gbps: float, config: cometrt.TileConfig | None
) -> dict[str, Any]:
    """config: of the fused layer; None: the one it has by itself."""
    ids, gate = routing(cell), Gate()

    def fn(world: cometrt.World) -> dict[str, Any]:
        rank = Rank(world, cell, ids, [None], False, config)
        distances = {"ours": rank.check()}
        runs = dict(rank.contenders)
        nccl = Nccl.connect(world)
        if nccl is not None:
            layer = rank.layers["sequential"]
            forward = NcclForward(nccl, layer, rank.x, ids, rank.topk_weights, rank.weights)
            forward()
            distances["nccl"] = relative_distance(forward.y, rank.expected)
            runs["nccl"] = forward
        wrong = {name: far for name, far in distances.items() if not far < 1e-2}
        if any(world.allgather(wrong)):
            raise cometrt.CometError(f"rank {world.rank}: far from sequential: {wrong}")
        times = take_turns(world, gate, runs, rounds)
        rank.close()
        return {
            "config": dataclasses.asdict(rank.layers["fused"].config),
            "times": times,
            "distances": distances,
            "sms": num_sms(),
            "device": cp.cuda.Device().id,
            "shares_gpu": world.shares_gpu,
        }

    results = cometrt.spawn(fn, cell.ranks, "cuda", link=cell.link, timeout_sec=20)
    slowest = {
        name: [max(run) for run in zip(*(r["times"][name] for r in results), strict=True)]
        for name in results[0]["times"]
    }
    shares_gpu, sms = results[0]["shares_gpu"], results[0]["sms"]
    crossing = crossing_bytes(cell, ids)
    rate = gbps * 1e9 * (sms / gpu_sms() if shares_gpu else 1)
    found = figures(cell, slowest, 1e3 * crossing / rate)
    if not shares_gpu:
        found["tflops"] = {name: value / cell.ranks for name, value in found["tflops"].items()}
    return found | {
        "config": results[0]["config"],
        "sms": sms,
        "devices": [r["device"] for r in results],
        "crossing_bytes": crossing,
        "distance": {n: max(r["distances"][n] for r in results) for n in results[0]["distances"]},
    }


def free_memory() -> None:
    gc.collect()  # what ranks held, in cycles
    for device in range(cp.cuda.runtime.getDeviceCount()):
        with cp.cuda.Device(device):
            cp.get_default_memory_pool().free_all_blocks()


TITLE = (
    f"{'TFLOP/s per GPU':28s}  fused sequen. chunked   nccl  GEMMs | fused ms  link ms | "
    "over sequential, chunked, nccl; efficiency, hidden share"
)


def line(name: str, found: dict[str, Any]) -> str:
    if "skipped" in found:
        return f"{name:28s} skipped: {found['skipped']}"
    rate, ms = found["tflops"], found["ms"]
    nccl = f"{rate['nccl']:6.0f}" if "nccl" in rate else "     -"
    over = f"{ms['nccl']['median'] / ms['fused']['median']:5.2f}" if "nccl" in rate else "    -"
    hidden = f"{found['hidden_share']:5.2f}" if "hidden_share" in found else "    -"
    return (
        f"{name:28s} {rate['fused']:6.0f} {rate['sequential']:6.0f} "
        f"{rate[found['best_chunked']]:7.0f} {nccl} {rate['gemms']:6.0f} | "
        f"{ms['fused']['median']:8.2f} {found['link_ms']:8.2f} | "
        f"{found['speedup_over_sequential']:5.2f} {found['speedup_over_chunked']:5.2f} {over} "
        f"{found['efficiency']:5.2f} {hidden}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--ranks", type=int, default=cp.cuda.runtime.getDeviceCount())
    parser.add_argument("--gbps", type=float, default=LINKS["h100"])
    parser.add_argument("--link", action="store_true")
    parser.add_argument("--models", default=",".join(SMALL_FIRST))
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--like", type=Path)
    args = parser.parse_args()
    LINKS[LINK] = args.gbps
    found = read(args.out) if args.out else {}
    found.setdefault("cells", {})
    others = read(args.like).get("cells", {}) if args.like else {}
    found |= {"machine": machine(), "gbps": args.gbps}
    print(TITLE, flush=True)
    for model in args.models.split(","):
        link = LINK if args.link else None
        cell = Cell(model, ranks=args.ranks, tokens=args.tokens, link=link)
        name = f"{model} W={args.ranks} T={args.tokens}"
        fields = others.get(name, {}).get("config")
        config = cometrt.TileConfig(**fields) if fields else None
        try:
            found["cells"][name] = measure(cell, args.rounds, args.gbps, config)
        except (cp.cuda.memory.OutOfMemoryError, cometrt.CometError, ValueError) as error:
            found["cells"][name] = {"skipped": f"{type(error).__name__}: {error}"}
        free_memory()
        print(line(name, found["cells"][name]), flush=True)
        write(args.out, found)
    if any("skipped" in cell for cell in found["cells"].values()):
        sys.exit("not all cells were measured")


if __name__ == "__main__":
    main()
