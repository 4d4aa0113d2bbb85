"""Serve a Mixture-of-Experts layer: one forward, captured in a CUDA graph and replayed.

    mpirun -n 4 python -m mpi4py examples/serve.py

Batches differ in size and a graph does not, so the rows that a batch leaves free are masked.
On the host the same forward is called, not replayed.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
from common import add_device_option, array_module, own_stream
from mpi4py import MPI

import cometrt
from cometrt.cli.inputs import pick_device, random_weights, to_device, to_host
from cometrt.models import scaled_spec

TOKENS, SCALE = 64, 16  # of the largest batch of a rank; divides the model's H and I


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, default=100)
    add_device_option(parser)
    args, comm = parser.parse_args(), MPI.COMM_WORLD
    rank, size, device = comm.Get_rank(), comm.Get_size(), pick_device(args.device)
    spec = scaled_spec("qwen3-30b-a3b", SCALE, max_tokens=TOKENS, capacity_factor=float(size))
    fixed, own = np.random.default_rng(0), np.random.default_rng(100 + rank)
    router = fixed.standard_normal((spec.hidden, spec.num_experts), np.float32)
    experts = cometrt.shard_weights(*random_weights(spec, seed=1), rank, size, spec)
    requests = own.standard_normal((args.batches, TOKENS, spec.hidden), np.float32)
    counts = own.integers(1, TOKENS + 1, args.batches)  # tokens of each batch
    with cometrt.connect(comm, device=device) as world, own_stream(world) as stream:
        layer = cometrt.MoELayer(world, spec)
        router, requests, *experts = to_device(world, router, requests, *experts)
        x = layer.buffer()  # the layer does not copy tokens that are written here
        logits = array_module(world).zeros((TOKENS, spec.num_experts), np.float32)
        used, y = logits.astype(bool), x.copy()  # used: whether a row may choose an expert

        def forward() -> None:
            ids, weights = cometrt.router.softmax_topk(logits, spec.topk, mask=used)
            layer.forward(x, ids, weights, *experts, training=False, out=y)

        def answer(batch: Any, run: Any) -> np.ndarray:
            """The layer's results for a batch, on the host."""
            count = len(batch)
            x[:count] = batch.astype(x.dtype)
            logits[:count] = batch @ router  # not in the graph: CuPy captures no `@`
            used[:count], used[count:] = True, False
            run()
            results = to_host(y[:count])[0]  # waits for them
            layer.synchronize()  # raises what went wrong on the device
            return results

        answer(requests[0], forward)  # loads kernels before the capture
        run = forward
        if stream is not None:
            stream.begin_capture()
            forward()
            run = stream.end_capture().launch
        times = [time.perf_counter()]
        for tokens, count in zip(requests, counts, strict=True):
            results = answer(tokens[:count], run)
            times.append(time.perf_counter())
        assert results.tobytes() == answer(tokens[:count], forward).tobytes()  # those of a call
    rate = comm.allreduce(int(counts.sum())) / comm.allreduce(times[-1] - times[0], MPI.MAX)
    p50, p99 = np.percentile(1e3 * np.concatenate(comm.allgather(np.diff(times))), [50, 99])
    if rank == 0:
        result = f"{rate:.0f} tokens/s, latency of a batch p50 {p50:.2f} ms, p99 {p99:.2f} ms"
        print(f"{size} ranks on {device}: {result}")


if __name__ == "__main__":
    main()
