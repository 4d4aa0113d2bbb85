"""Data parallel x expert parallel: two groups of ranks train one layer; each has all experts.

    mpirun -n 4 python -m mpi4py examples/two_groups.py  # 2 x 2

Tokens travel within a group. Gradients of experts are summed over the groups. In the first step,
results are compared with the float64 reference of all ranks' tokens.
"""

from __future__ import annotations

import argparse

import numpy as np
from common import GradientSum, add_device_option
from mpi4py import MPI

import cometrt
from cometrt.bench.workloads import relative_error
from cometrt.cli.inputs import pick_device, random_weights, to_device, to_host, tolerance

GROUPS, TOKENS, STEPS, RATE = 2, 64, 40, 0.2  # tokens of each rank
SPEC = cometrt.MoESpec(
    hidden=64, intermediate=96, num_experts=8, topk=2, max_tokens=TOKENS, capacity_factor=4
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_device_option(parser)
    device, comm = pick_device(parser.parse_args().device), MPI.COMM_WORLD
    rank, size = comm.Get_rank(), comm.Get_size()
    if size % GROUPS:
        parser.error(f"the number of ranks must be even (got {size})")
    group = comm.Split(rank // (size // GROUPS), rank)  # rank r takes GPU r in any group
    across = comm.Split(rank % (size // GROUPS), rank)  # the ranks with the same experts

    model = random_weights(SPEC, seed=0)  # of all experts, the same on every rank
    rng = np.random.default_rng(100 + rank)
    x = rng.standard_normal((TOKENS, SPEC.hidden)).astype(SPEC.numpy_dtype)
    logits = rng.standard_normal((TOKENS, SPEC.num_experts))
    tokens = x, *cometrt.router.softmax_topk(logits, SPEC.topk)
    with cometrt.connect(group, device) as world, cometrt.MoELayer(world, SPEC) as layer:
        shards = cometrt.shard_weights(*model, world.rank, world.size, SPEC)
        experts = to_device(world, *(w.astype(np.float32) for w in shards))
        *inputs, target = to_device(world, *tokens, np.ascontiguousarray(x[:, ::-1]))
        sum_over_groups = GradientSum(across, world)
        for step in range(STEPS):
            y, saved = layer.forward(*inputs, *(w.astype(SPEC.numpy_dtype) for w in experts))
            error = y.astype(np.float32) - target  # loss: its square, averaged over all tokens
            dy = (2 * error / (TOKENS * size)).astype(SPEC.numpy_dtype)
            grads = layer.backward(dy, saved)
            sums = [gradient.astype(np.float32) for gradient in (grads.w_up, grads.w_down)]
            sum_over_groups(sums)
            for w, gradient in zip(experts, sums, strict=True):
                w -= RATE * gradient
            if step % 10 == 9 or step == 0:
                layer.synchronize()  # raises what went wrong on the device
                if step == 0:
                    check(comm, world, model, tokens, *to_host(dy, y, *sums))
                loss = comm.allreduce(float((error**2).sum()) / (TOKENS * size))
                if rank == 0:
                    print(f"step {step}: loss {loss:.2f}", flush=True)


def check(comm, world, model, tokens, dy, *found) -> None:
    """Collective: raise a CometError unless y and the sums are those of the reference."""
    whole = map(np.concatenate, zip(*comm.allgather((dy, *tokens)), strict=True))
    grads = cometrt.reference.moe_backward(*whole, *model, SPEC.activation)
    shards = cometrt.shard_weights(grads.w_up, grads.w_down, world.rank, world.size, SPEC)
    expected = cometrt.reference.moe_forward(*tokens, *model, SPEC.activation), *shards
    worst = comm.allreduce(max(map(relative_error, found, expected)), MPI.MAX)
    if not worst < tolerance(SPEC):
        raise cometrt.CometError(f"y, dw_up or dw_down is off by {worst:.1e}")
    if comm.Get_rank() == 0:
        print(f"{GROUPS} x {world.size} ranks on {world.device}: errors of at most {worst:.1e}")


if __name__ == "__main__":
    main()
