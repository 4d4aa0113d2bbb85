"""The model of benchmarks.end_to_end: a few Transformer layers in JAX, with MoE layers.

Each layer is x + attention(norm(x)), then x + moe(norm(x)). Attention is causal, with rotary
positions and grouped queries. There is no vocabulary: tokens come as vectors, and the model learns
to reverse the order of each token's numbers. The loss is the mean squared error.

Experts are sharded over the mesh's axis "x"; all else is data parallel. All parameters are
bfloat16, and softmax, norms and loss are computed in float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.stacks import Attention, Stack

DTYPE = jnp.bfloat16
RATE = 0.002  # of SGD; of experts times their number, since each has that share of the tokens
NOISE = 10.0  # standard deviation of what is added to a router's logits, whose own is about 1


# ---- parameters and inputs -------------------------------------------------------------------


def start(stack: Stack, mesh: Any) -> tuple[dict[str, Any], tuple[Any, Any]]:
    """Parameters, and inputs (x, noise); the same values on any mesh.

    Parameters are {"shared": a dict of each layer, "experts": the same}. x is [W * B, S, H]; noise
    of the routers is [L, W * T, E].
    """
    return _start(stack, mesh, np.uint32(0))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _start(stack: Stack, mesh: Any, seed: Any) -> Any:
    """The seed is no constant, else XLA might draw numbers while it compiles."""
    shape, attention = stack.shape, stack.attention
    hidden, columns, experts = shape.hidden, shape.intermediate, shape.num_experts
    of_heads = attention.heads * attention.head_size
    of_kv = attention.kv_heads * attention.head_size
    residual = (2 * stack.layers) ** -0.5  # of what is added to the residual stream
    keys = iter(jax.random.split(jax.random.key(seed), 2 + 7 * stack.layers))

    def draw(spec: Any, *size: int, scale: float = 1.0) -> Any:
        values = (scale * jax.random.normal(next(keys), size)).astype(DTYPE)
        return lax.with_sharding_constraint(values, NamedSharding(mesh, spec))

    inputs = (
        draw(P("x"), stack.ranks * stack.batch, stack.sequence, hidden),
        draw(P(None, "x"), stack.layers, stack.ranks * stack.tokens, experts),
    )
    parameters: dict[str, Any] = {"shared": [], "experts": []}
    for _ in range(stack.layers):
        parameters["shared"].append(
            {
                # Norms scale by 1 + these.
                "attention_norm": draw(P(), hidden, scale=0.1),
                "qkv": draw(P(), hidden, of_heads + 2 * of_kv, scale=hidden**-0.5),
                "project": draw(P(), of_heads, hidden, scale=residual * of_heads**-0.5),
                "moe_norm": draw(P(), hidden, scale=0.1),
                "router": draw(P(), hidden, experts, scale=hidden**-0.5),
            }
        )
        parameters["experts"].append(
            {
                "w_up": draw(P("x"), experts, 2 * columns, hidden, scale=hidden**-0.5),
                "w_down": draw(P("x"), experts, hidden, columns, scale=residual * columns**-0.5),
            }
        )
    return parameters, inputs


# ---- the model, on each rank -----------------------------------------------------------------


def rms_norm(x: Any, scale: Any) -> Any:
    wide = x.astype(jnp.float32)
    wide *= lax.rsqrt(jnp.square(wide).mean(axis=-1, keepdims=True) + 1e-6)
    return (wide * (1 + scale.astype(jnp.float32))).astype(x.dtype)


def rotate(x: Any) -> Any:
    """Rotary positions: x [B, S, heads, head size] -> the same shape."""
    half = x.shape[-1] // 2
    rates = 10000.0 ** -(jnp.arange(half, dtype=jnp.float32) / half)
    angles = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None, None] * rates  # [S, 1, half]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def attend(x: Any, layer: dict[str, Any], shape: Attention, implementation: str) -> Any:
    """x [B, S, H] -> [B, S, H]."""
    num_heads = (shape.heads, shape.kv_heads, shape.kv_heads)
    ends = [sum(num_heads[: i + 1]) * shape.head_size for i in (0, 1)]
    query, key, value = (
        part.reshape(*x.shape[:2], heads, shape.head_size)
        for part, heads in zip(jnp.split(x @ layer["qkv"], ends, axis=-1), num_heads, strict=True)
    )
    mixed = jax.nn.dot_product_attention(
        rotate(query), rotate(key), value, is_causal=True, implementation=implementation
    )
    return mixed.reshape(*x.shape[:2], -1) @ layer["project"]


def route(x: Any, router: Any, noise: Any, topk: int) -> tuple[Any, Any]:
    """Noisy top-k: ids [T, K], and their weights [T, K], a softmax of logits without the noise.

    The noise decides, so experts have equal loads but for chance.
    """
    logits = (x @ router).astype(jnp.float32)
    ids = lax.top_k(lax.stop_gradient(logits) + NOISE * noise, topk)[1]
    return ids, jax.nn.softmax(jnp.take_along_axis(logits, ids, axis=1))


Moe = Callable[[Any, Any, Any, Any, Any], Any]  # x, ids, weights, w_up, w_down -> y


def make_step(stack: Stack, mesh: Any, moe: Moe | None) -> Callable[..., tuple[Any, Any]]:
    """step(parameters, inputs) -> (loss, gradients), jitted: a forward and a backward.

    Gradients of what is replicated are summed over the ranks.

    Args:
        moe: None: y is x times the sum of its weights, and parameters have no experts.
    """
    shape, topk = stack.attention, stack.shape.topk
    implementation = "xla" if mesh.devices.flat[0].platform == "cpu" else "cudnn"
    size = mesh.size * stack.tokens

    def loss_of(parameters: Any, x: Any, noise: Any) -> Any:
        """This rank's part of the loss."""
        target, hidden = x[..., ::-1], x.shape[-1]
        experts = parameters["experts"] if moe else [{}] * stack.layers
        for number, layer in enumerate(parameters["shared"]):
            normed = rms_norm(x, layer["attention_norm"])
            x = x + attend(normed, layer, shape, implementation)
            normed = rms_norm(x, layer["moe_norm"]).reshape(-1, hidden)
            ids, weights = route(normed, layer["router"], noise[number], topk)
            if moe:
                y = moe(normed, ids, weights, *(experts[number][w] for w in ("w_up", "w_down")))
            else:
                y = normed * weights.sum(axis=1, keepdims=True).astype(normed.dtype)
            x = x + y.reshape(x.shape)
        return jnp.square((x - target).astype(jnp.float32)).sum() / size

    def on_rank(parameters: Any, x: Any, noise: Any) -> tuple[Any, Any]:
        loss, gradients = jax.value_and_grad(loss_of)(parameters, x, noise)
        loss, gradients["shared"] = lax.psum((loss, gradients["shared"]), "x")
        return loss, gradients

    specs = {"shared": P(), "experts": P("x")} if moe else {"shared": P()}
    mapped = jax.shard_map(
        on_rank,
        mesh=mesh,
        in_specs=(specs, P("x"), P(None, "x")),
        out_specs=(P(), specs),
        check_vma=False,
    )
    return jax.jit(lambda parameters, inputs: mapped(parameters, *inputs))


@functools.partial(jax.jit, static_argnums=2, donate_argnums=0)
def update(master: Any, gradients: Any, stack: Stack) -> Any:
    """A step of SGD on parameters in float32."""
    rates = {"shared": RATE, "experts": RATE * stack.shape.num_experts}
    return {
        kind: jax.tree.map(lambda p, g, rate=rates[kind]: p - rate * g, master[kind], found)
        for kind, found in gradients.items()
    }


@jax.jit
def perturbed(parameters: Any) -> Any:
    """With as much noise as rounding to bfloat16 makes: what it does to losses is noise, too."""
    leaves, tree = jax.tree.flatten(parameters)
    keys = jax.random.split(jax.random.key(9), len(leaves))
    noisy = (
        (array * (1 + 2.0**-9 * jax.random.normal(key, array.shape))).astype(array.dtype)
        for key, array in zip(keys, leaves, strict=True)
    )
    return jax.tree.unflatten(tree, noisy)


@functools.partial(jax.jit, static_argnums=1)
def cast(parameters: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda array: array.astype(dtype), parameters)
