"""Real text through a Mixture-of-Experts layer on four ranks, checked, with its timeline.

The tokens are bytes of Python's own standard library. A fixed random table embeds each byte, and
its position is added. A softmax router chooses 8 of 128 experts for each token. Text repeats
itself, so some experts get many more tokens than others. The layer has the number of experts and
the top-k of qwen3-30b-a3b, and smaller widths.

mpirun -n 4 python -m mpi4py examples/demo.py        (or: make demo)
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import numpy as np
from common import (
    add_device_option,
    errors_against_reference,
    pick_device,
    random_weights,
    stop_if_wrong,
    to_device,
    to_host,
)
from mpi4py import MPI

import cometrt
from cometrt.models import scaled_spec


def standard_library(num_bytes: int) -> np.ndarray:
    """The first bytes of the standard library's source files, in the order of their names."""
    text = b""
    for path in sorted(Path(os.__file__).parent.glob("*.py")):
        text += path.read_bytes()
        if len(text) >= num_bytes:
            break
    return np.frombuffer(text[:num_bytes], np.uint8)


def positions(num_tokens: int, hidden: int) -> np.ndarray:
    """[T, H]: sine and cosine of each position, as in "Attention Is All You Need", 3.5."""
    rate = 10000.0 ** (-np.arange(0, hidden, 2) / hidden)
    angle = np.arange(num_tokens)[:, None] * rate
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", type=int, default=4, help="divides the model's H and I")
    parser.add_argument("--tokens", type=int, default=256, help="bytes of text per rank")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the timeline")
    add_device_option(parser)
    args = parser.parse_args()

    comm = MPI.COMM_WORLD
    rank, size = comm.Get_rank(), comm.Get_size()
    spec = scaled_spec(
        "qwen3-30b-a3b", args.scale, max_tokens=args.tokens, capacity_factor=float(size)
    )
    text = standard_library(size * args.tokens + 1)
    mine = text[rank * args.tokens : (rank + 1) * args.tokens + 1]  # and one more, to predict

    fixed = np.random.default_rng(0)  # the same on every rank
    table = fixed.standard_normal((256, spec.hidden))
    router = fixed.standard_normal((spec.hidden, spec.num_experts)) / np.sqrt(spec.hidden)
    x = (table[mine[:-1]] + positions(args.tokens, spec.hidden)).astype(spec.numpy_dtype)
    logits = x.astype(np.float64) @ router
    ids, topk_weights = cometrt.router.softmax_topk(logits, spec.topk)
    weights = random_weights(spec, seed=1)
    w_up, w_down = cometrt.shard_weights(*weights, rank, size, spec)

    with cometrt.connect(comm, device=pick_device(args.device)) as world:
        layer = cometrt.MoELayer(world, spec)
        model = to_device(world, x, ids, topk_weights, w_up, w_down)
        if rank == 0:
            print(
                f"qwen3-30b-a3b / {args.scale}: H={spec.hidden} I={spec.intermediate} "
                f"E={spec.num_experts} K={spec.topk} {spec.dtype}, {size} ranks on "
                f"{world.device}, mode {layer.mode}, "
                f"{args.tokens} bytes of the standard library each",
                flush=True,
            )
        # Two rounds: the first warms up, the second is kept. The loss is half the squared distance
        # of y from the embedding of the next byte, so its gradient dy is their difference.
        for _ in range(2):
            world.barrier()
            with cometrt.trace.record(layer) as recording:
                begin = time.perf_counter()
                there, saved = layer.forward(*model)
                layer.synchronize()
                y = to_host(there)[0]
                dy = (y.astype(np.float32) - table[mine[1:]]).astype(spec.numpy_dtype)
                there = layer.backward(to_device(world, dy)[0], saved)
                layer.synchronize()
                grads = cometrt.Gradients(*to_host(*there))
                seconds = time.perf_counter() - begin
        timeline = recording.gather()
        inputs = (x, ids, topk_weights)
        errors = errors_against_reference(comm, spec, weights, inputs, dy, y, grads)
        stop_if_wrong(comm, errors, spec)
        report(comm, spec, ids, seconds, timeline, max(errors.values()), args.out)


def report(comm, spec, ids, seconds, timeline, error, out) -> None:
    """Print on rank 0 what each rank did and how full the experts were; draw the timeline."""
    rank, size = comm.Get_rank(), comm.Get_size()
    all_ids = np.concatenate(comm.allgather(ids))
    experts = spec.num_experts // size
    # A token crosses the link once to each other rank that has one of its experts: x in forward
    # and dy in backward. Partial sums of y and dx come back, which are as large.
    source = np.repeat(np.arange(size), [len(rows) for rows in comm.allgather(ids)])
    here = (all_ids // experts == rank).any(axis=1) & (source != rank)
    crossing = 2 * int(here.sum()) * spec.hidden * spec.numpy_dtype.itemsize / 1e6
    line = (
        f"{rank:4d} {len(ids):7d} {np.sum(all_ids // experts == rank):7d} "
        f"{crossing:10.2f} {crossing:10.2f} {seconds * 1e3:8.0f} {error:14.1e}"
    )
    lines = comm.gather(line)
    if rank:
        return
    print("rank  tokens    rows  pulled MB  pushed MB  time ms  largest error")
    print("\n".join(lines))
    load = cometrt.router.load_statistics(all_ids, spec.num_experts)
    busiest = np.argsort(-load.counts, kind="stable")[:4]
    print(
        f"experts' load: busiest {', '.join(f'#{e} {load.counts[e]}' for e in busiest)}; "
        f"{load.imbalance:.1f}x the mean, coefficient of variation {load.variation:.2f}, "
        f"{load.idle} of {spec.num_experts} idle"
    )
    print("every result agrees with the float64 reference")
    if timeline.hidden_share != timeline.hidden_share:  # it is NaN
        print("hidden share: unknown (nothing crossed, or on CUDA not in a fused forward)")
        return
    print(
        f"hidden share: {timeline.hidden_share:.0%} of the time in which rows cross between ranks "
        f"runs under GEMMs of the same rank"
    )
    print(f"where the time of each role went:\n{timeline.waits()}")
    out.mkdir(parents=True, exist_ok=True)
    timeline.save_json(out / "timeline.json")
    calls = "one forward"  # on CUDA a backward is not recorded
    if timeline.seconds(0, "wgrad"):
        calls += ", then one backward,"
    title = f"{calls} on {size} ranks: {timeline.hidden_share:.0%} hidden"
    try:
        timeline.save_png(out / "timeline.png", title)
        print(f"timeline: {out / 'timeline.png'}; for Perfetto: {out / 'timeline.json'}")
    except ImportError as missing:
        print(f"timeline for Perfetto: {out / 'timeline.json'} (no picture: {missing})")


if __name__ == "__main__":
    main()
