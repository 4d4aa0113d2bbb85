"""Training steps while NCCL reduces gradients in another stream, unordered, under mpirun.

    mpirun -n 4 python tests/multi/nccl_beside.py 1000

Ranks launch the reduction before a step or after it, by turns, so that its kernel waits on some
ranks, holding SMs, while others make their step. Then one rank waits on its host for the reduction
before it queues its step: the others, whose steps wait for it, must leave NCCL room. Results must
have the bits of a step alone.
"""

import os
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import cupy as cp
import numpy as np
from cupy.cuda import nccl
from mpi4py import MPI

import cometrt
from tests.multi.aborting import aborting

HIDDEN, INTERMEDIATE, EXPERTS, TOPK, TOKENS = 2048, 768, 128, 8, 4096
REDUCED_BYTES = 256 << 20
EVERY = 20  # steps between two looks at the results


class Rank:
    """A layer with its arrays, and gradients of another part of the model."""

    def __init__(self, comm, world):
        spec = cometrt.MoESpec(HIDDEN, INTERMEDIATE, EXPERTS, TOPK, TOKENS)
        self.layer = cometrt.MoELayer(world, spec)
        rng, local = np.random.default_rng(comm.rank), EXPERTS // comm.size

        def normal(*shape):
            values = rng.standard_normal(shape, np.float32) * np.float32(0.03)
            return cp.asarray(values.astype(spec.numpy_dtype))

        scores = rng.random((TOKENS, EXPERTS))
        ids = np.argsort(scores, axis=1)[:, :TOPK].astype(np.int32)
        self.inputs = (
            normal(TOKENS, HIDDEN),
            cp.asarray(ids),
            cp.asarray(rng.random(ids.shape, np.float32)),
            normal(local, 2 * INTERMEDIATE, HIDDEN),
            normal(local, HIDDEN, INTERMEDIATE),
        )
        self.dy = normal(TOKENS, HIDDEN)
        unique = comm.bcast(nccl.get_unique_id() if comm.rank == 0 else None)
        self._nccl = nccl.NcclCommunicator(comm.size, unique, comm.rank)
        self._side = cp.cuda.Stream(non_blocking=True)
        self._reduced = cp.zeros(REDUCED_BYTES // 4, cp.float32)
        self.reduce()
        self._side.synchronize()

    def reduce(self):
        data = self._reduced.data.ptr
        self._nccl.allReduce(
            data, data, self._reduced.size, nccl.NCCL_FLOAT32, nccl.NCCL_SUM, self._side.ptr
        )

    def step(self):
        y, saved = self.layer.forward(*self.inputs)
        return y, self.layer.backward(self.dy, saved)

    def wait(self):
        self.layer.synchronize()
        self._side.synchronize()


def hosts_wait(rank, comm, steps):
    """Results of steps that one rank queues when its reduction has ended, and others before theirs
    begins."""
    for step in range(steps):
        if step % comm.size == comm.rank:
            rank.reduce()
            rank.wait()
            yield rank.step()
        else:
            results = rank.step()
            rank.reduce()
            yield results
        rank.wait()


def timed(rank, comm, steps, reduces):
    """Milliseconds a step, of the slowest rank."""
    rank.wait()
    comm.Barrier()
    begin = time.perf_counter()
    for step in range(steps):
        early = step % 2 == comm.rank % 2
        if reduces and early:
            rank.reduce()
        y, grads = rank.step()
        if reduces and not early:
            rank.reduce()
        if step % EVERY == EVERY - 1:
            rank.wait()
            yield y, grads
    rank.wait()
    rank.ms = 1e3 * comm.allreduce(time.perf_counter() - begin, MPI.MAX) / steps


def bits(y, grads):
    """On the device: they are large."""
    return [array.view(cp.uint16).copy() for array in (y, *grads)]


def same(found, expected):
    return all(bool((a == b).all()) for a, b in zip(found, expected, strict=True))


def main():
    comm, steps = MPI.COMM_WORLD, max(EVERY, int(sys.argv[1]))
    world = cometrt.connect(comm, device="cuda", timeout_sec=10)
    rank = Rank(comm, world)
    expected = None
    for y, grads in timed(rank, comm, 3 * EVERY, reduces=False):
        expected = expected or bits(y, grads)
    alone = rank.ms
    for y, grads in timed(rank, comm, steps, reduces=True):
        assert same(bits(y, grads), expected)
    beside = rank.ms
    for y, grads in hosts_wait(rank, comm, 2 * comm.size):
        assert same(bits(y, grads), expected)
    comm.Barrier()
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        rank.reduce()
        rank.wait()
        times.append(1e3 * (time.perf_counter() - begin))
    reduction = comm.allreduce(statistics.median(times), MPI.MAX)
    if comm.rank == 0:
        print(
            f"{steps} steps on {comm.size} GPUs: {alone:.2f} ms a step alone, {beside:.2f} ms "
            f"beside an all-reduce of {REDUCED_BYTES >> 20} MB, which alone takes {reduction:.2f}",
            flush=True,
        )


if __name__ == "__main__":
    with aborting():
        main()
