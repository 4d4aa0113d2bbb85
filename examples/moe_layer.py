"""One Mixture-of-Experts layer of a known model, scaled down: forward and backward, checked.

Tokens, weights and routing are random. Each call is timed, and the results of the last one are
compared with the float64 reference.

mpirun -n 4 python -m mpi4py examples/moe_layer.py --model mixtral-8x7b --scale 16
mpirun -n 4 python -m mpi4py examples/moe_layer.py --model qwen2-moe --tp 2 --order columns
"""

from __future__ import annotations

import argparse
import time

import numpy as np
from common import add_device_option
from mpi4py import MPI

import cometrt
from cometrt.cli.inputs import (
    check_errors,
    errors_against_reference,
    pick_device,
    random_weights,
    to_device,
    to_host,
)
from cometrt.models import MODELS, scaled_spec


def share(timeline: cometrt.trace.Timeline) -> str:
    """The hidden share as text.

    It is unknown where no row crossed between ranks, and on CUDA where the forward is not fused.
    """
    hidden = timeline.hidden_share
    return "unknown share" if hidden != hidden else f"{hidden:.0%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="qwen3-30b-a3b")
    parser.add_argument("--scale", type=int, default=16, help="divides H and I")
    parser.add_argument("--tokens", type=int, default=256, help="per rank")
    parser.add_argument("--tp", type=int, default=1, help="shards of each expert")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--save", choices=["rows", "z", "nothing"], default="rows")
    parser.add_argument("--mode", choices=["fused", "sequential"], help="default: the best")
    add_device_option(parser)
    parser.add_argument("--order", choices=["phases", "columns"], default="phases")
    parser.add_argument("--skew", type=float, default=0.0, help="how unequal experts are loaded")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--trace", metavar="FILE.json", help="write a Chrome trace")
    args = parser.parse_args()
    if args.repeats < 1:
        parser.error(f"--repeats must be >= 1 (got {args.repeats})")

    spec = scaled_spec(
        args.model, args.scale, max_tokens=args.tokens, tp=args.tp, dtype=args.dtype,
        save=args.save, capacity_factor=4.0,
    )  # fmt: skip
    comm = MPI.COMM_WORLD
    rank, size = comm.Get_rank(), comm.Get_size()
    weights = random_weights(spec, seed=0)
    w_up, w_down = cometrt.shard_weights(*weights, rank, size, spec)
    rng = np.random.default_rng(1 + rank)
    x = rng.standard_normal((args.tokens, spec.hidden)).astype(spec.numpy_dtype)
    dy = rng.standard_normal((args.tokens, spec.hidden)).astype(spec.numpy_dtype)
    bias = args.skew * np.random.default_rng(99).standard_normal(spec.num_experts)
    logits = rng.standard_normal((args.tokens, spec.num_experts)) + bias
    ids, topk_weights = cometrt.router.softmax_topk(logits, spec.topk)

    config = cometrt.TileConfig(order=args.order)
    with cometrt.connect(comm, device=pick_device(args.device)) as world:
        inputs = to_device(world, x, ids, topk_weights, w_up, w_down)
        dy_there = to_device(world, dy)[0]
        layer = cometrt.MoELayer(world, spec, args.mode, config=config)
        if rank == 0:
            print(layer, flush=True)
        for repeat in range(args.repeats):
            world.barrier()
            with cometrt.trace.record(layer) as recording:
                begin = time.perf_counter()
                y, saved = layer.forward(*inputs)
                layer.synchronize()
                forward = time.perf_counter()
                grads = layer.backward(dy_there, saved)
                layer.synchronize()
                end = time.perf_counter()
            seconds = [comm.allreduce(s, MPI.MAX) for s in (forward - begin, end - forward)]
            timeline = recording.gather()
            if rank == 0:
                print(
                    f"call {repeat}: forward {seconds[0] * 1e3:.1f} ms, "
                    f"backward {seconds[1] * 1e3:.1f} ms (slowest rank), "
                    f"{share(timeline)} of the communication under compute",
                    flush=True,
                )
        if args.trace and rank == 0:
            timeline.save_json(args.trace)
        y, *grads = to_host(y, *grads)
        errors = errors_against_reference(
            world, spec, weights, (x, ids, topk_weights), dy, y, cometrt.Gradients(*grads)
        )
        check_errors(world, errors, spec)
        largest = {name: comm.allreduce(error, MPI.MAX) for name, error in errors.items()}
        if rank == 0:
            print("checked:", ", ".join(f"{name} {error:.1e}" for name, error in largest.items()))


if __name__ == "__main__":
    main()
