"""Train a small model with a Mixture-of-Experts layer, without a framework, on several ranks.

The model predicts the next byte of the source files of Python's standard library. It adds the
embeddings of the last two bytes, runs one MoE layer with a residual connection, and ends in a
linear head. Each rank holds its own experts. Embedding, router and head are the same on every
rank, so their gradients are summed over the ranks.

On the host all arrays are NumPy's. On a GPU they are CuPy's, and a step never leaves it: the host
waits only every tenth step, to print. Ranks with a GPU each sum their gradients by NCCL.

mpirun -n 4 python -m mpi4py examples/train_bytes.py
"""

from __future__ import annotations

import argparse
import math
from typing import Any

import numpy as np
from common import GradientSum, add_device_option, array_module
from mpi4py import MPI

import cometrt
from cometrt.cli.inputs import (
    pick_device,
    random_weights,
    standard_library,
    to_device,
    to_host,
)

BALANCE, Z = 0.01, 0.001  # coefficients of the router's losses


class Adam:
    """Adam (arXiv 1412.6980). It updates fp32 parameters in place."""

    def __init__(self, xp: Any, parameters: list[Any], rate: float) -> None:
        self.xp, self.parameters, self.rate, self.step = xp, parameters, rate, 0
        self.moments = [(xp.zeros_like(p), xp.zeros_like(p)) for p in parameters]

    def update(self, gradients: list[Any]) -> None:
        self.step += 1
        rate = self.rate * math.sqrt(1 - 0.999**self.step) / (1 - 0.9**self.step)
        for parameter, gradient, (first, second) in zip(
            self.parameters, gradients, self.moments, strict=True
        ):
            first += 0.1 * (gradient - first)
            second += 0.001 * (gradient * gradient - second)
            parameter -= rate * first / (self.xp.sqrt(second) + 1e-8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--tokens", type=int, default=128, help="bytes per rank and step")
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--rate", type=float, default=1e-2)
    add_device_option(parser)
    args = parser.parse_args()

    comm = MPI.COMM_WORLD
    rank, size = comm.Get_rank(), comm.Get_size()
    tokens, hidden, device = args.tokens, args.hidden, pick_device(args.device)
    spec = cometrt.MoESpec(
        hidden=hidden,
        intermediate=2 * hidden,
        num_experts=4 * size,
        topk=2,
        max_tokens=tokens,
        dtype="float32" if device == "host" else "bfloat16",
        capacity_factor=float(size),
    )
    seeded = np.random.default_rng(0)
    embed = 0.5 * seeded.standard_normal((2, 256, hidden), np.float32)
    router = seeded.standard_normal((hidden, spec.num_experts), np.float32) / np.sqrt(hidden)
    head = np.zeros((hidden, 256), np.float32)
    experts = cometrt.shard_weights(*random_weights(spec, seed=1), rank, size, spec)
    experts = [w.astype(np.float32) for w in experts]  # what the optimiser adds to

    text = standard_library(1 << 18).astype(np.int64)
    order = np.random.default_rng(100 + rank)  # each rank reads its own places of the text
    at = order.integers(2, len(text) - 1, (args.steps, tokens))
    with cometrt.connect(comm, device=device) as world:
        xp = array_module(world)
        embed, router, head = to_device(world, embed, router.astype(np.float32), head)
        experts = to_device(world, *experts)
        lasts, befores, targets = to_device(world, text[at - 1], text[at - 2], text[at])
        replicated = Adam(xp, [embed, router, head], args.rate)
        local = Adam(xp, experts, args.rate)
        sum_over_ranks = GradientSum(comm, world)
        layer = cometrt.MoELayer(world, spec)
        every_token, losses = xp.arange(tokens), []
        for step in range(args.steps):
            last, before, target = lasts[step], befores[step], targets[step]

            x = embed[0][last] + embed[1][before]  # [T, H]
            logits = x @ router
            ids, topk_weights = cometrt.router.softmax_topk(logits, spec.topk)
            weights = [w.astype(spec.numpy_dtype) for w in experts]
            y, saved = layer.forward(x.astype(spec.numpy_dtype), ids, topk_weights, *weights)
            h = x + y.astype(np.float32)
            scores = h @ head
            scores -= scores.max(axis=1, keepdims=True)
            probability = xp.exp(scores) / xp.exp(scores).sum(axis=1, keepdims=True)
            losses.append(-xp.log(probability[every_token, target]).mean())

            # Backward: the head, the layer with its router, then the embeddings.
            dscores = probability
            dscores[every_token, target] -= 1
            dscores /= tokens * size
            dh = dscores @ head.T
            grads = layer.backward(dh.astype(spec.numpy_dtype), saved)
            dlogits = cometrt.router.softmax_topk_backward(grads.topk_weights, logits, ids)
            dlogits += cometrt.router.balance_loss_backward(BALANCE / size, logits, ids)
            dlogits += cometrt.router.z_loss_backward(Z / size, logits)
            dx = dh + grads.x.astype(np.float32) + dlogits @ router.T
            dembed = xp.zeros_like(embed)
            xp.add.at(dembed[0], last, dx)
            xp.add.at(dembed[1], before, dx)
            shared = [dembed, x.T @ dlogits, h.T @ dscores]
            sum_over_ranks(shared)
            replicated.update(shared)
            local.update([grads.w_up.astype(np.float32), grads.w_down.astype(np.float32)])

            if step % 10 == 0 or step == args.steps - 1:
                layer.synchronize()
                loss = comm.allreduce(float(losses[-1])) / size
                every = np.concatenate(comm.allgather(to_host(ids)[0]))
                load = cometrt.router.load_statistics(every, spec.num_experts)
                if rank == 0:
                    print(
                        f"step {step:4d}  loss {loss:.3f} nats/byte  "
                        f"busiest expert {load.imbalance:.2f}x the mean",
                        flush=True,
                    )
        mean = [comm.allreduce(float(loss)) / size for loss in losses]
    if len(mean) >= 30 and not np.mean(mean[-5:]) < mean[0] - 1:
        raise SystemExit(f"the loss did not fall: {mean[0]:.3f} -> {np.mean(mean[-5:]):.3f}")


if __name__ == "__main__":
    main()
