"""The layer in JAX: a dense layer to compare with, inputs of a mesh, and JAX's virtual devices."""

from __future__ import annotations

import os

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

import cometrt
from cometrt.interop import jax as cometrt_jax

DEVICES = 4
SHARDED = PartitionSpec("expert")


def small_spec(**changes) -> cometrt.MoESpec:
    fields = {
        "hidden": 32,
        "intermediate": 48,
        "num_experts": 8,
        "topk": 2,
        "max_tokens": 8,
        "dtype": "float32",
        "capacity_factor": 8.0,
    }
    return cometrt.MoESpec(**(fields | changes))


def arrays_of(spec: cometrt.MoESpec, tokens: int, seed: int = 0) -> tuple[jax.Array, ...]:
    """x, ids, weights of so many tokens, w_up and w_down of all experts. One pair is dropped."""
    rng = np.random.default_rng(seed)
    draw = rng.normal
    rows = (2 if spec.gated else 1) * spec.intermediate
    ids, weights = cometrt.router.softmax_topk(draw(size=(tokens, spec.num_experts)), spec.topk)
    ids[0, 0] = -1
    x = draw(size=(tokens, spec.hidden))
    w_up = draw(0, spec.hidden**-0.5, (spec.num_experts, rows, spec.hidden))
    w_down = draw(0, spec.intermediate**-0.5, (spec.num_experts, spec.hidden, spec.intermediate))
    own = (array.astype(spec.numpy_dtype) for array in (w_up, w_down))
    tables = ids.astype(np.int32), weights.astype(np.float32)
    return tuple(map(jnp.asarray, (x.astype(spec.numpy_dtype), *tables, *own)))


def dense(x, ids, weights, w_up, w_down):
    """All experts of all tokens, swiglu, and the chosen ones' weighted sum."""
    gate, up = jnp.split(jnp.einsum("th,eih->tei", x, w_up), 2, axis=-1)
    o = jnp.einsum("tei,ehi->teh", jax.nn.silu(gate) * up, w_down)
    chosen = jnp.take_along_axis(o, jnp.maximum(ids, 0)[..., None], axis=1)
    y = jnp.einsum("tk,tkh->th", jnp.where(ids < 0, 0, weights), chosen)
    return y.astype(x.dtype)


def mapped(function, mesh, axes=("expert",), **options):
    """function(x, ids, weights, w_up, w_down) on the mesh, with tokens sharded over `axes`."""
    tokens = PartitionSpec(axes)
    specs = (tokens, tokens, tokens, SHARDED, SHARDED)
    return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=tokens, **options)


def gradients(function, arrays):
    """Value and gradients of a loss of function(*arrays), jitted, but for the ids."""
    x, ids, weights, w_up, w_down = arrays

    def loss(x, weights, w_up, w_down):
        y = function(x, ids, weights, w_up, w_down)
        return jnp.square(y.astype(jnp.float32)).sum()

    found = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3)))(x, weights, w_up, w_down)
    return jax.tree.leaves(jax.block_until_ready(found))


def check_equal(found, expected, tolerance=1e-5):
    for ours, theirs in zip(found, expected, strict=True):
        scale = float(jnp.abs(theirs).max())
        np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance * scale)


def bits(arrays) -> list[bytes]:
    return [np.asarray(array).tobytes() for array in arrays]


def step_of(moe):
    """y and all gradients of one layer, jitted."""

    @jax.jit
    def step(dy, x, ids, *rest):
        y, backward = jax.vjp(lambda x, *rest: moe(x, ids, *rest), x, *rest)
        return [y, *backward(dy)]

    return step


def epoch_of(world: cometrt_jax.JaxWorld) -> int:
    """Exchanges so far, the same on all ranks of this process."""
    (epoch,) = {rank.epoch for rank in world.ranks.values()}
    return epoch


def environment() -> dict[str, str]:
    """Of a process whose JAX has one CPU device."""
    flags = os.environ.get("XLA_FLAGS", "").split()
    kept = [flag for flag in flags if not flag.startswith("--xla_force_host_platform_device_count")]
    return os.environ | {"XLA_FLAGS": " ".join(kept)}
