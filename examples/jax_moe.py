"""Train a JAX model with a Mixture-of-Experts layer: router, layer, loss and update in one jit.

    python examples/jax_moe.py                        # four ranks on one CPU, or one GPU
    mpirun -n 4 python -m mpi4py examples/jax_moe.py  # a process for each rank

Ranks are the devices of a mesh. Tokens and experts are sharded over its axis "expert".
"""

from __future__ import annotations

import os

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import cometrt
from cometrt.interop import jax as cometrt_jax

TOKENS, STEPS, RATE = 64, 40, 0.2  # tokens of each rank
SPEC = cometrt.MoESpec(
    hidden=64, intermediate=96, num_experts=8, topk=2, max_tokens=TOKENS, capacity_factor=4
)
SHARDS = {"router": P(), "w_up": P("expert"), "w_down": P("expert")}


def random_start(num_tokens: int) -> tuple[dict[str, jax.Array], jax.Array]:
    """Parameters and tokens of all ranks, in float32."""
    experts, hidden, columns = SPEC.num_experts, SPEC.hidden, SPEC.intermediate
    draw, keys = jax.random.normal, jax.random.split(jax.random.key(0), 4)
    router = 0.1 * draw(keys[0], (hidden, experts))
    w_up = hidden**-0.5 * draw(keys[1], (experts, 2 * columns, hidden))
    w_down = 0.1 * draw(keys[2], (experts, hidden, columns))
    params = {"router": router, "w_up": w_up, "w_down": w_down}
    return params, draw(keys[3], (num_tokens, hidden))


def main() -> None:
    launched = any(name in os.environ for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"))
    if launched:  # each process takes the GPU of its number on the host
        jax.distributed.initialize(cluster_detection_method="mpi4py")
    else:
        jax.config.update("jax_num_cpu_devices", 4)
    whole = launched or jax.default_backend() == "cpu"  # one process uses one GPU
    mesh = jax.sharding.Mesh(np.array(jax.devices() if whole else jax.devices()[:1]), ("expert",))
    with cometrt_jax.connect(mesh) as world, cometrt_jax.MoE(world, SPEC) as moe:

        def loss_of(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
            """On each rank: the layer learns to turn its tokens round."""
            weights, ids = jax.lax.top_k(jax.nn.softmax(x @ params["router"]), SPEC.topk)
            w_up, w_down = (params[name].astype(jnp.bfloat16) for name in ("w_up", "w_down"))
            y = moe(x.astype(jnp.bfloat16), ids, weights, w_up, w_down)
            error = y.astype(jnp.float32) - x[:, ::-1]
            return jax.lax.pmean(jnp.square(error).sum(axis=-1).mean(), "expert")

        loss = jax.shard_map(loss_of, mesh=mesh, in_specs=(SHARDS, P("expert")), out_specs=P())

        @jax.jit
        def step(params: dict[str, jax.Array], x: jax.Array) -> tuple[dict, jax.Array]:
            value, grads = jax.value_and_grad(loss)(params, x)
            return jax.tree.map(lambda p, g: p - RATE * g, params, grads), value

        shardings = jax.tree.map(lambda shard: NamedSharding(mesh, shard), (SHARDS, P("expert")))
        start = jax.jit(lambda: random_start(world.size * TOKENS), out_shardings=shardings)
        params, x = start()
        for number in range(STEPS):
            params, value = step(params, x)
            if jax.process_index() == 0 and (number % 10 == 0 or number == STEPS - 1):
                print(f"step {number}: loss {float(value):.2f}")
        moe.check()  # raises what went wrong in a call


if __name__ == "__main__":
    main()
