"""Train a Mixture-of-Experts layer with CuPy: router, layer, balance loss and update on the GPU.

    mpirun -n 4 python -m mpi4py examples/cupy_moe.py

Ranks are processes. Each has its own tokens and its own experts; the router is the same on all. The
layer learns to reverse the order of each token's numbers. Without a Hopper GPU arrays are NumPy's.
"""

from __future__ import annotations

import argparse

import numpy as np
from common import GradientSum, add_device_option, array_module
from mpi4py import MPI

import cometrt
from cometrt.cli.inputs import pick_device, random_weights, to_device

TOKENS, STEPS, RATE, BALANCE = 64, 40, 0.2, 0.01  # tokens of each rank; BALANCE: a coefficient
SPEC = cometrt.MoESpec(
    hidden=64, intermediate=96, num_experts=8, topk=2, max_tokens=TOKENS, capacity_factor=4
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_device_option(parser)
    device = pick_device(parser.parse_args().device)
    comm = MPI.COMM_WORLD
    rank, size = comm.Get_rank(), comm.Get_size()

    seeded = np.random.default_rng(0)  # the same on every rank
    router = 0.1 * seeded.standard_normal((SPEC.hidden, SPEC.num_experts), np.float32)
    experts = cometrt.shard_weights(*random_weights(SPEC, seed=1), rank, size, SPEC)
    x = np.random.default_rng(100 + rank).standard_normal((TOKENS, SPEC.hidden), np.float32)
    with cometrt.connect(comm, device=device) as world, cometrt.MoELayer(world, SPEC) as layer:
        xp = array_module(world)  # CuPy, or NumPy on the host
        bfloat16 = SPEC.numpy_dtype  # of the layer; all else is float32
        x, router, *experts = to_device(world, x, router, *(w.astype(np.float32) for w in experts))
        target = xp.ascontiguousarray(x[:, ::-1])
        sum_over_ranks = GradientSum(comm, world)
        for step in range(STEPS):
            # Forward: each token's experts and their weights, then the layer.
            logits = x @ router  # [T, E]
            ids, weights = cometrt.router.softmax_topk(logits, SPEC.topk)
            w_up, w_down = (w.astype(bfloat16) for w in experts)
            y, saved = layer.forward(x.astype(bfloat16), ids, weights, w_up, w_down)
            error = y.astype(np.float32) - target  # loss: its square, averaged over all tokens

            # Backward: the layer, then the router. Experts get gradients of all ranks' tokens.
            dy = (2 * error / (TOKENS * size)).astype(bfloat16)
            grads = layer.backward(dy, saved)
            dlogits = cometrt.router.softmax_topk_backward(grads.topk_weights, logits, ids)
            dlogits += cometrt.router.balance_loss_backward(BALANCE / size, logits, ids)
            drouter = x.T @ dlogits
            sum_over_ranks([drouter])

            # Update: plain SGD.
            router -= RATE * drouter
            for w, gradient in zip(experts, (grads.w_up, grads.w_down), strict=True):
                w -= RATE * gradient.astype(np.float32)

            if step % 10 == 0 or step == STEPS - 1:  # here alone the host waits for the GPU
                layer.synchronize()  # raises what went wrong on the device
                losses = (
                    xp.square(error).sum(axis=1).mean(),
                    cometrt.router.balance_loss(logits, ids),
                )
                loss, balance = (comm.allreduce(float(value)) / size for value in losses)
                if rank == 0:
                    print(f"step {step}: loss {loss:.2f}, balance loss {balance:.2f}", flush=True)


if __name__ == "__main__":
    main()
