"""Train a small model with a Mixture-of-Experts layer, in plain NumPy, on several ranks.

The model predicts the next byte of the source files of Python's standard library. It adds the
embeddings of the last two bytes, runs one MoE layer with a residual connection, and ends in a
linear head. Each rank holds its own experts. Embedding, router and head are the same on every
rank, so their gradients are summed over the ranks.

mpirun -n 4 python -m mpi4py examples/train_bytes.py
"""

from __future__ import annotations

import argparse

import numpy as np
from common import random_weights
from demo import standard_library
from mpi4py import MPI

import cometrt


class Adam:
    """Adam (arXiv 1412.6980). It updates fp32 parameters in place."""

    def __init__(self, parameters: list[np.ndarray], rate: float) -> None:
        self.parameters, self.rate, self.step = parameters, rate, 0
        self.moments = [(np.zeros_like(p), np.zeros_like(p)) for p in parameters]

    def update(self, gradients: list[np.ndarray]) -> None:
        self.step += 1
        rate = self.rate * np.sqrt(1 - 0.999**self.step) / (1 - 0.9**self.step)
        for parameter, gradient, (first, second) in zip(
            self.parameters, gradients, self.moments, strict=True
        ):
            first += 0.1 * (gradient - first)
            second += 0.001 * (gradient * gradient - second)
            parameter -= rate * first / (np.sqrt(second) + 1e-8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--tokens", type=int, default=128, help="bytes per rank and step")
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--rate", type=float, default=1e-2)
    args = parser.parse_args()

    comm = MPI.COMM_WORLD
    rank, size = comm.Get_rank(), comm.Get_size()
    tokens, hidden = args.tokens, args.hidden
    spec = cometrt.MoESpec(
        hidden=hidden,
        intermediate=2 * hidden,
        num_experts=4 * size,
        topk=2,
        max_tokens=tokens,
        dtype="float32",
        capacity_factor=float(size),
    )
    seeded = np.random.default_rng(0)
    embed = 0.5 * seeded.standard_normal((2, 256, hidden), np.float32)
    router = seeded.standard_normal((hidden, spec.num_experts), np.float32) / np.sqrt(hidden)
    router = router.astype(np.float32)
    head = np.zeros((hidden, 256), np.float32)
    experts = cometrt.shard_weights(*random_weights(spec, seed=1), rank, size, spec)
    replicated, local = Adam([embed, router, head], args.rate), Adam(list(experts), args.rate)

    text = standard_library(1 << 18)
    order = np.random.default_rng(100 + rank)  # each rank reads its own places of the text
    with cometrt.connect(comm, device="host") as world:
        layer = cometrt.MoELayer(world, spec)
        losses = []
        for step in range(args.steps):
            at = order.integers(2, len(text) - 1, tokens)
            last, before, target = text[at - 1], text[at - 2], text[at]

            x = embed[0][last] + embed[1][before]  # [T, H]
            logits = x @ router
            ids, topk_weights = cometrt.router.softmax_topk(logits, spec.topk)
            y, saved = layer.forward(x, ids, topk_weights, *experts)
            h = x + y
            scores = h @ head
            scores -= scores.max(axis=1, keepdims=True)
            probability = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
            loss = -np.log(probability[np.arange(tokens), target]).mean()

            # Backward: the head, the layer with its router, then the embeddings.
            dscores = probability
            dscores[np.arange(tokens), target] -= 1
            dscores /= tokens * size
            dh = dscores @ head.T
            grads = layer.backward(dh, saved)
            dlogits = cometrt.router.softmax_topk_backward(grads.topk_weights, logits, ids)
            dx = dh + grads.x + dlogits @ router.T
            dembed = np.zeros_like(embed)
            np.add.at(dembed[0], last, dx)
            np.add.at(dembed[1], before, dx)
            shared = [dembed, x.T @ dlogits, h.T @ dscores]
            for gradient in shared:
                comm.Allreduce(MPI.IN_PLACE, gradient)
            replicated.update(shared)
            local.update([grads.w_up, grads.w_down])

            losses.append(comm.allreduce(float(loss)) / size)
            if step % 10 == 0 or step == args.steps - 1:
                every = np.concatenate(comm.allgather(ids))
                load = cometrt.router.load_statistics(every, spec.num_experts)
                if rank == 0:
                    print(
                        f"step {step:4d}  loss {losses[-1]:.3f} nats/byte  "
                        f"busiest expert {load.imbalance:.2f}x the mean",
                        flush=True,
                    )
    if len(losses) >= 30 and not np.mean(losses[-5:]) < losses[0] - 1:
        raise SystemExit(f"the loss did not fall: {losses[0]:.3f} -> {np.mean(losses[-5:]):.3f}")


if __name__ == "__main__":
    main()
