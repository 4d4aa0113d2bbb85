"""The layer inside JAX programs: under jit, grad, jax.checkpoint, lax.scan and shard_map.

    world = cometrt.interop.jax.connect(mesh)  # or connect() in each process
    moe = cometrt.interop.jax.MoE(world, cometrt.MoESpec(...))
    y = moe(x, topk_ids, topk_weights, w_up, w_down)

On a GPU each call is queued on XLA's stream, and all its arrays are buffers of XLA. On the CPU it
runs in the host world. Importing this package needs JAX.
"""

from cometrt.interop.jax.moe import RESIDUALS, MoE, save_residuals
from cometrt.interop.jax.worlds import JaxWorld, connect

__all__ = ["RESIDUALS", "JaxWorld", "MoE", "connect", "save_residuals"]
