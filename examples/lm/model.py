"""The model: a Transformer decoder over bytes in which every feed-forward layer is an MoE layer.

Parameters are float32. Arrays that all layers have are stacked along a first axis of L layers, and
`lax.scan` runs the layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import cometrt

VOCABULARY = 256  # one token is one byte
AXES = ("data", "expert")  # of the mesh; ranks differ in both, and experts in the second


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes of the model. They are stored in checkpoints, and must not change in a run."""

    layers: int
    hidden: int
    heads: int
    sequence: int
    experts: int
    topk: int
    intermediate: int

    def moe_spec(self, tokens: int, tp: int, dtype: str, capacity_factor: float) -> cometrt.MoESpec:
        """Of the MoE layers, for so many tokens of a rank."""
        return cometrt.MoESpec(
            hidden=self.hidden,
            intermediate=self.intermediate,
            num_experts=self.experts,
            topk=self.topk,
            max_tokens=tokens,
            tp=tp,
            dtype=dtype,
            capacity_factor=capacity_factor,
        )


def random_parameters(config: ModelConfig, seed: int) -> dict[str, Any]:
    """Float32 parameters of the whole model, the same on every process.

    Experts are those of the model, not of a rank: w_up [L, E, 2I, H] and w_down [L, E, H, I].
    """
    rng = np.random.default_rng(seed)
    layers, hidden, columns = config.layers, config.hidden, config.intermediate

    def normal(*shape: int, scale: float) -> np.ndarray:
        values = rng.standard_normal(shape, np.float32)
        return values * np.float32(scale)

    residual = (2 * layers) ** -0.5  # of what is added to the residual stream
    return {
        "embedding": normal(VOCABULARY, hidden, scale=0.5),
        "positions": normal(config.sequence, hidden, scale=0.1),
        "norm": np.ones(hidden, np.float32),
        "head": normal(hidden, VOCABULARY, scale=0.5 * hidden**-0.5),
        "blocks": {
            "attention_norm": np.ones((layers, hidden), np.float32),
            "qkv": normal(layers, hidden, 3 * hidden, scale=hidden**-0.5),
            "project": normal(layers, hidden, hidden, scale=residual * hidden**-0.5),
            "moe_norm": np.ones((layers, hidden), np.float32),
            "router": normal(layers, hidden, config.experts, scale=hidden**-0.5),
        },
        "experts": {
            "w_up": normal(layers, config.experts, 2 * columns, hidden, scale=hidden**-0.5),
            "w_down": normal(
                layers, config.experts, hidden, columns, scale=residual * columns**-0.5
            ),
        },
    }


def dense_experts(x: Any, ids: Any, weights: Any, w_up: Any, w_down: Any) -> Any:
    """The reference of `MoE`, in plain JAX on one device: all experts of all tokens."""
    gate, up = jnp.split(jnp.einsum("th,eih->tei", x, w_up), 2, axis=-1)
    outputs = jnp.einsum("tei,ehi->teh", jax.nn.silu(gate) * up, w_down)  # [T, E, H]
    chosen = jnp.take_along_axis(outputs, ids[..., None], axis=1)  # [T, K, H]
    return jnp.einsum("tk,tkh->th", weights.astype(x.dtype), chosen)


def rms_norm(x: Any, scale: Any) -> Any:
    wide = x.astype(jnp.float32)
    wide *= jax.lax.rsqrt(jnp.square(wide).mean(axis=-1, keepdims=True) + 1e-6)
    return (wide * scale).astype(x.dtype)


def attention(x: Any, block: dict[str, Any], heads: int, implementation: str) -> Any:
    """Causal self-attention: x [B, S, H] -> [B, S, H]."""
    batch, sequence, hidden = x.shape
    qkv = (x @ block["qkv"].astype(x.dtype)).reshape(batch, sequence, 3, heads, hidden // heads)
    query, key, value = (qkv[:, :, part] for part in range(3))
    mixed = jax.nn.dot_product_attention(
        query, key, value, is_causal=True, implementation=implementation
    )
    return mixed.reshape(x.shape) @ block["project"].astype(x.dtype)


def route(x: Any, router: Any, topk: int) -> tuple[Any, Any, tuple[Any, Any]]:
    """Softmax top-k of tokens x [T, H].

    Returns:
        ids [T, K]; weights [T, K] float32; and the tokens and the mean probability of each expert,
        [E] each.
    """
    probabilities = jax.nn.softmax(x.astype(jnp.float32) @ router)
    weights, ids = jax.lax.top_k(probabilities, topk)
    counts = (ids[..., None] == jnp.arange(router.shape[-1])).sum((0, 1))
    weights /= weights.sum(axis=-1, keepdims=True)
    return ids, weights, (counts.astype(jnp.float32), probabilities.mean(axis=0))


def forward(
    parameters: dict[str, Any],
    tokens: Any,
    config: ModelConfig,
    moe: Callable[..., Any],
    dtype: str,
    implementation: str,
) -> tuple[Any, Any, Any]:
    """Scores of the next byte, on each rank inside a shard_map over AXES.

    Args:
        tokens: [B, S] of this rank. One outside of the vocabulary gives NaN.

    Returns:
        scores [B, S, 256] float32, the mean balance loss of the layers, and the tokens of each
        expert [L, E]. The two latter are of the global batch.
    """

    def block(x: Any, layer: tuple[dict[str, Any], dict[str, Any]]) -> tuple[Any, Any]:
        parts, experts = layer
        normed = rms_norm(x, parts["attention_norm"])
        x = x + attention(normed, parts, config.heads, implementation)
        normed = rms_norm(x, parts["moe_norm"]).reshape(-1, config.hidden)
        ids, weights, load = route(normed, parts["router"], config.topk)
        w_up, w_down = (experts[name].astype(dtype) for name in ("w_up", "w_down"))
        return x + moe(normed, ids, weights, w_up, w_down).reshape(x.shape), load

    embedded = jnp.take(parameters["embedding"], tokens, axis=0, mode="fill", fill_value=jnp.nan)
    x = (embedded + parameters["positions"]).astype(dtype)
    x, load = jax.lax.scan(block, x, (parameters["blocks"], parameters["experts"]))
    # Over the global batch, after all layers: so peers of a late rank wait in the first MoE layer,
    # which has a deadline.
    counts, probabilities = jax.lax.psum(load, AXES)
    shares = [each / each.sum(axis=-1, keepdims=True) for each in (counts, probabilities)]
    balance = config.experts * (shares[0] * shares[1]).sum(axis=-1).mean()
    x = rms_norm(x, parameters["norm"])
    scores = (x @ parameters["head"].astype(dtype)).astype(jnp.float32)
    return scores, balance, counts
