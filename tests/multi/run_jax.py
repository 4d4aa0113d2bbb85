"""The rank side of tests of JAX under mpirun: a plain jit in each process, on CPUs or GPUs."""

from __future__ import annotations

import contextlib
import os
import sys

import jax
import numpy as np
import pytest
from mpi4py import MPI

COMM = MPI.COMM_WORLD
if "--gpus" in sys.argv:  # how many this host has; before JAX starts
    # This rank's GPU comes first: JAX compiles for a GPU of another number only where
    # jax.distributed runs ("Device id 1 is out of range").
    num_gpus = int(sys.argv[sys.argv.index("--gpus") + 1])
    seen = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(num_gpus)))
    seen, own = seen.split(","), COMM.Get_rank() % num_gpus
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(seen[own:] + seen[:own])
    jax.config.update("jax_cuda_visible_devices", "0")

import cometrt  # noqa: E402
from cometrt.interop import jax as cometrt_jax  # noqa: E402
from tests.cases import on_device, on_host  # noqa: E402
from tests.jax_cases import arrays_of, bits, small_spec, step_of  # noqa: E402


def on_gpu(world):
    """Within it the rank's GPU is the thread's, which JAX may have changed."""
    if world.device == "host":
        return contextlib.nullcontext()
    import cupy

    return cupy.cuda.Device(0)


def test_bits_are_those_of_the_layer(world, moe, arrays, dy):
    """Three times: on a GPU a call that comes again is a graph."""
    step, own = step_of(moe), world.ranks[0]
    move = on_device(own)
    with on_gpu(own), cometrt.MoELayer(own, moe.spec) as layer:
        given = [move(np.asarray(array)) for array in arrays]
        y, saved = layer.forward(*given)
        expected = [on_host(a) for a in (y, *layer.backward(move(np.asarray(dy)), saved))]
        layer.synchronize()
    for _ in range(3):
        assert bits(step(dy, *arrays)) == bits(expected)
    y = jax.jit(moe)(*arrays)
    assert bits([y]) == bits(expected[:1])
    moe.check()


def test_errors_of_one_rank_reach_all(world, moe, arrays, dy):
    x, ids, *rest = arrays
    step, wrong = step_of(moe), ids.at[0, 0].set(99) if world.rank == 1 else ids
    found = step(dy, x, wrong, *rest)
    assert all(np.isnan(np.asarray(array, np.float32)).all() for array in found)
    later = np.asarray(step(dy, *arrays)[0], np.float32)  # before anybody has asked
    assert np.isnan(later).all() if world.device == "cuda" else np.isfinite(later).all()
    with pytest.raises(cometrt.RoutingError, match="rank 1"):
        moe.check()
    before = bits(step(dy, *arrays))
    moe.check()
    assert bits(step(dy, *arrays)) == before


def test_a_missing_rank_ends_the_call(world, moe, arrays, dy):
    own = world.ranks[0]
    before, own.timeout_sec = own.timeout_sec, 3.0
    if world.rank == 0:
        y = jax.jit(moe)(*arrays)
        assert np.isnan(np.asarray(y, np.float32)).all()
        with pytest.raises(cometrt.PeerTimeout, match="rank 0 waited"):
            moe.check()
    COMM.Barrier()
    own.timeout_sec = before
    world.reset()
    assert np.isfinite(np.asarray(step_of(moe)(dy, *arrays)[0], np.float32)).all()
    moe.check()


def main() -> None:
    # Long enough for kernels that are compiled on a GPU.
    timeout_sec = 3 if jax.default_backend() == "cpu" else 20
    with cometrt_jax.connect(comm=COMM, timeout_sec=timeout_sec) as world:
        rank, size = world.rank, world.size
        assert (rank, size) == (COMM.Get_rank(), COMM.Get_size())
        spec = small_spec(dtype="bfloat16", hidden=64, intermediate=64, max_tokens=40)
        x, ids, weights, *whole = arrays_of(spec, 20 + 20 * rank, seed=rank)
        whole = [np.asarray(array) for array in arrays_of(spec, 1)[3:]]
        shards = cometrt.shard_weights(*whole, rank, size, spec)
        arrays = [x, ids, weights, *map(jax.numpy.asarray, shards)]
        with cometrt_jax.MoE(world, spec) as moe:
            for test in (
                test_bits_are_those_of_the_layer,
                test_errors_of_one_rank_reach_all,
                test_a_missing_rank_ends_the_call,
            ):
                test(world, moe, arrays, jax.numpy.sin(x))
    print(f"rank {rank} on {world.device}: all is well", flush=True)


if __name__ == "__main__":
    main()
