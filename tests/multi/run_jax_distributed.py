"""One process of tests of JAX without MPI: `jax.distributed`, shard_map, and training steps."""

from __future__ import annotations

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

RATE = 0.1  # of learning
SHARDED, WHOLE = PartitionSpec("expert"), PartitionSpec()
PARAMETERS = {"before": WHOLE, "after": WHOLE, "experts": PartitionSpec(None, "expert")}


def training_step(layer, mesh):
    """(parameters, x, ids, weights, wanted) -> (parameters, loss): two layers in a scan with
    jax.checkpoint, between dense ones. XLA sums the loss and the gradients of the dense ones."""

    def block(x, given):
        (w_up, w_down), ids, weights = given
        return x + layer(x, ids, weights, w_up, w_down), None

    def loss_of(parameters, x, ids, weights, wanted):
        x = x + jnp.tanh(x @ parameters["before"])
        two = jnp.stack([ids, ids]), jnp.stack([weights, weights])
        x, _ = jax.lax.scan(jax.checkpoint(block), x, (parameters["experts"], *two))
        y = (x @ parameters["after"]).astype(jnp.float32)
        return jnp.square(y - wanted.astype(jnp.float32)).mean()

    def step(parameters, *batch):
        dense = {name: parameters[name] for name in ("before", "after")}
        own = {n: jax.lax.pcast(array, "expert", to="varying") for n, array in dense.items()}
        loss, grads = jax.value_and_grad(loss_of)(own | {"experts": parameters["experts"]}, *batch)
        for name in dense:
            grads[name] = jax.lax.psum(grads[name], "expert")
        new = jax.tree.map(
            lambda array, grad: array - (RATE * grad).astype(array.dtype), parameters, grads
        )
        return new, jax.lax.pmean(loss, "expert")

    specs = PARAMETERS, *(SHARDED,) * 4
    mapped = jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=(PARAMETERS, WHOLE))
    return jax.jit(mapped, donate_argnums=0)


def train(layer, mesh, arrays, spec, steps):
    """Losses of so many steps, always from the same parameters."""
    x, ids, weights, w_up, w_down = arrays
    rng = np.random.default_rng(1)

    def dense():
        values = rng.normal(0, spec.hidden**-0.5, (spec.hidden, spec.hidden))
        return jax.device_put(values.astype(spec.numpy_dtype), NamedSharding(mesh, WHOLE))

    def stacked(array):
        function = jax.jit(lambda a: jnp.stack([a, a[::-1]]), out_shardings=two)
        return function(array)

    two = NamedSharding(mesh, PARAMETERS["experts"])
    parameters = {"before": dense(), "after": dense()}
    parameters["experts"] = stacked(w_up), stacked(w_down)
    wanted = jax.jit(jnp.sin)(x)
    step, losses = training_step(layer, mesh), []
    for _ in range(steps):
        parameters, loss = step(parameters, x, ids, weights, wanted)
        losses.append(loss)
    layer.check()
    return [float(loss.addressable_data(0)) for loss in losses]


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

        swapped = jax.sharding.Mesh(mesh.devices[::-1], ("expert",))
        there = NamedSharding(swapped, SHARDED)
        forms = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=there) for a in arrays]
        for layer, rule in ((moe, "the devices of the world"), (again, "the processes of the")):
            with pytest.raises(ValueError, match=f"mesh of jax.shard_map must have {rule}"):
                jax.jit(mapped(layer, swapped)).lower(*forms)

        begin = time.monotonic()
        losses = train(moe, mesh, arrays, spec, options.steps)
        seconds = time.monotonic() - begin
        assert np.isfinite(losses).all(), losses
        assert losses[-1] < 0.9 * losses[0], losses
        few = min(options.steps, 20)
        assert train(again, mesh, arrays, spec, few) == losses[:few]
        moe.close()
        again.close()
    print(
        f"process {options.process} on {world.device}: all is well; {options.steps} steps in "
        f"{seconds:.1f} s, loss {losses[0]:.4f} to {losses[-1]:.4f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
