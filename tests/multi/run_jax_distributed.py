"""One process of test_jax.py without MPI: `jax.distributed`, shard_map over the processes, psum."""

from __future__ import annotations

import argparse

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--process", type=int, required=True)
    parser.add_argument("--processes", type=int, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--gpus", action="store_true", help="process i takes GPU i")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    jax.distributed.initialize(
        f"localhost:{options.port}",
        options.processes,
        options.process,
        local_device_ids=[options.process] if options.gpus else None,
    )

    from cometrt.interop import jax as cometrt_jax
    from tests.jax_cases import arrays_of, dense, mapped, small_spec

    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("expert",))
    dtype = "bfloat16" if options.gpus else "float32"
    spec = small_spec(dtype=dtype, hidden=64, intermediate=64)
    host = [np.asarray(array) for array in arrays_of(spec, spec.max_tokens * options.processes)]
    sharding = NamedSharding(mesh, PartitionSpec("expert"))
    arrays = [
        jax.make_array_from_callback(array.shape, sharding, lambda index, a=array: a[index])
        for array in host
    ]
    # Two worlds: one by the mesh, one by the processes.
    with (
        cometrt_jax.connect(mesh, timeout_sec=60) as world,
        cometrt_jax.connect(timeout_sec=60) as processes,
    ):
        assert world.rank == processes.rank == jax.process_index()
        moe = cometrt_jax.MoE(world, spec)
        again = cometrt_jax.MoE(processes, spec)

        def loss(function, *arrays):
            return jnp.square(function(*arrays).astype(jnp.float32)).sum()

        def gradients(function):
            return jax.jit(jax.grad(lambda *arrays: loss(function, *arrays), (0, 2, 3, 4)))

        def local(array):
            (shard,) = array.addressable_shards
            return np.asarray(shard.data, np.float32)

        expected = gradients(dense)(*map(jnp.asarray, host))
        for layer in (moe, again):
            found = gradients(mapped(layer, mesh))(*arrays)
            for ours, theirs in zip(found, expected, strict=True):
                count = len(theirs) // options.processes
                own = np.asarray(theirs[world.rank * count :][:count], np.float32)
                error = np.linalg.norm(local(ours) - own) / np.linalg.norm(own)
                assert error < (2e-2 if options.gpus else 1e-5), error

        def body(x, *rest):
            y = moe(x, *rest) + 1e-2 * jax.lax.psum(moe(jnp.sin(x), *rest), "expert")
            scale = jax.lax.pmean(jnp.square(y.astype(jnp.float32)).mean(), "expert")
            return (y / jnp.sqrt(1e-3 + scale)).astype(x.dtype)

        step, x = jax.jit(mapped(body, mesh)), arrays[0]
        for _ in range(options.steps):
            x = step(x, *arrays[1:])
        assert np.isfinite(local(jax.block_until_ready(x))).all()
        moe.check()
        moe.close()
        again.close()
    print(f"process {options.process} on {world.device}: all is well", flush=True)


if __name__ == "__main__":
    main()
