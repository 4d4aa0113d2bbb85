"""Record one forward of a model's layer, and draw what every rank did, and when.

On GPUs the picture shows the CTAs of the fused kernels: which ones multiply, which ones move rows,
and what they wait for. The weights and the routing are random.

mpirun -n 4 python -m mpi4py examples/timeline.py --model qwen3-30b-a3b --tokens 8192 --scale 1
mpirun -n 4 python -m mpi4py examples/timeline.py --device host
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from common import add_device_option, pick_device, to_device
from mpi4py import MPI

import cometrt
from cometrt.models import MODELS, scaled_spec


def local_weights(layer: cometrt.MoELayer) -> list[np.ndarray]:
    """This rank's w_up [E_l, 2 * I_s, H] and w_down [E_l, H, I_s], random."""
    rng = np.random.default_rng(layer.world.rank)
    geometry = layer.geometry
    weights = []
    for shape in (geometry.w_up_shape, geometry.w_down_shape):
        values = rng.standard_normal(shape, np.float32)
        values /= np.sqrt(shape[-1])  # keeps the results near 1
        weights.append(values.astype(layer.spec.numpy_dtype))
    return weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="qwen3-30b-a3b")
    parser.add_argument("--scale", type=int, default=4, help="divides the model's H and I")
    parser.add_argument("--tokens", type=int, default=256, help="per rank")
    parser.add_argument("--mode", choices=["fused", "sequential"], help="default: the best")
    parser.add_argument("--warm-up", type=int, default=3, help="forwards before the recorded one")
    parser.add_argument("--rank", type=int, help="draw a lane for each CTA of this rank alone")
    parser.add_argument("--out", type=Path, default=Path("out/timeline.png"), help="the picture")
    parser.add_argument("--json", type=Path, help="also write a trace for Perfetto")
    add_device_option(parser)
    args = parser.parse_args()

    comm = MPI.COMM_WORLD
    spec = scaled_spec(args.model, args.scale, max_tokens=args.tokens)
    rng = np.random.default_rng(100 + comm.Get_rank())
    x = rng.standard_normal((args.tokens, spec.hidden), np.float32).astype(spec.numpy_dtype)
    logits = rng.standard_normal((args.tokens, spec.num_experts))
    ids, topk_weights = cometrt.router.softmax_topk(logits, spec.topk)

    with cometrt.connect(comm, device=pick_device(args.device)) as world:
        layer = cometrt.MoELayer(world, spec, args.mode)
        inputs = to_device(world, x, ids, topk_weights, *local_weights(layer))
        for _ in range(args.warm_up):
            layer.forward(*inputs)
        layer.synchronize()
        # The first recorded forward still warms up: it runs kernels that were just loaded.
        for _ in range(2):
            with cometrt.trace.record(layer) as recording:
                world.barrier()
                layer.forward(*inputs)
                layer.synchronize()
        timeline = recording.gather()
    if comm.Get_rank() == 0:
        draw(timeline, layer, args)


def draw(timeline: cometrt.trace.Timeline, layer: cometrt.MoELayer, args) -> None:
    """Write the picture, and print where the time went."""
    if not timeline.events:
        raise SystemExit(f"nothing is recorded on {layer.world.device} in mode {layer.mode!r}")
    scaled = "" if args.scale == 1 else f" / {args.scale}"
    title = (
        f"{args.model}{scaled}, {args.tokens} tokens a rank: one forward on {layer.world.size} "
        f"ranks, {layer.world.device}, mode {layer.mode}"
    )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    timeline.save_png(args.out, title, rank=args.rank)
    print(title)
    print(f"{timeline.span_sec * 1e3:.3f} ms; hidden share {timeline.hidden_share:.0%}")
    print(timeline.waits())
    print(f"picture: {args.out} ({args.out.stat().st_size / 1024:.0f} KB)")
    if args.json:
        timeline.save_json(args.json)


if __name__ == "__main__":
    main()
