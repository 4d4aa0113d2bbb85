"""One training step: loss, gradients summed over the ranks, and the optimizer's update."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from lm.model import AXES, ModelConfig, forward, rms_norm, route

BALANCE = 0.01  # coefficient of the balance loss
TOKENS = P(AXES)  # each rank has its own sequences


def make_optimizer(rate: float) -> Any:
    """AdamW with gradients clipped to norm 1. The rate rises over 20 steps, and stays."""
    schedule = optax.warmup_constant_schedule(0.1 * rate, rate, 20)
    return optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.01)
    )


def vary(parameters: dict[str, Any]) -> dict[str, Any]:
    """Parameters as arrays that may differ between ranks. So their gradients are summed over the
    ranks in float32, before the casts of the model."""

    def of(path: Any, array: Any) -> Any:
        axes = ("data",) if path[0].key == "experts" else AXES
        return jax.lax.pcast(array, axes, to="varying")

    return jax.tree_util.tree_map_with_path(of, parameters)


def make_step(
    mesh: Any,
    config: ModelConfig,
    moe: Callable[..., Any],
    dtype: str,
    attention: str,
    optimizer: Any,
    specs: Any,
) -> Callable[[Any, Any], tuple[Any, dict[str, Any]]]:
    """step(state, tokens) -> (state, metrics), not yet jitted.

    Metrics are scalars, the same on all ranks: loss in nats per byte, the mean of all tokens;
    balance; norm of the gradients; load, the rows of the busiest expert over the mean. A call of
    the layer that fails on any rank gives NaN there, so loss or norm is NaN on all ranks.

    Args:
        specs: PartitionSpecs of the parameters.
    """

    def on_rank(parameters: dict[str, Any], tokens: Any) -> tuple[Any, dict[str, Any]]:
        scores, balance, counts = forward(
            vary(parameters), tokens[:, :-1], config, moe, dtype, attention
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(scores, tokens[:, 1:])
        loss = jax.lax.pmean(losses.mean(), AXES)
        load = (counts.max(axis=1) / counts.mean(axis=1)).max()
        return loss + BALANCE * balance, {"loss": loss, "balance": balance, "load": load}

    loss_of = jax.shard_map(on_rank, mesh=mesh, in_specs=(specs, TOKENS), out_specs=(P(), P()))

    def step(state: Any, tokens: Any) -> tuple[Any, dict[str, Any]]:
        parameters = state["parameters"]
        (_, metrics), gradients = jax.value_and_grad(loss_of, has_aux=True)(parameters, tokens)
        metrics["norm"] = optax.tree.norm(gradients)
        updates, moments = optimizer.update(gradients, state["optimizer"], parameters)
        updated = {"parameters": optax.apply_updates(parameters, updates), "optimizer": moments}
        # After a failure the state stays, so that later steps do not fail for its NaN.
        finite = jnp.isfinite(metrics["loss"] + metrics["norm"])
        return jax.tree.map(lambda new, old: jnp.where(finite, new, old), updated, state), metrics

    return step


def make_probe(
    mesh: Any, config: ModelConfig, moe: Callable[..., Any], dtype: str, specs: Any
) -> Callable[[Any, Any], Any]:
    """probe(parameters, tokens): forward and backward of the first MoE layer alone, to be timed.

    It returns a mean over the ranks, which is NaN if a call failed on any rank.
    """

    def on_rank(parameters: dict[str, Any], tokens: Any) -> Any:
        parameters = vary(parameters)
        x = jnp.take(parameters["embedding"], tokens[:, :-1], axis=0).reshape(-1, config.hidden)
        x = rms_norm(x, parameters["blocks"]["moe_norm"][0]).astype(dtype)
        ids, weights, _ = route(x, parameters["blocks"]["router"][0], config.topk)
        experts = [parameters["experts"][name][0].astype(dtype) for name in ("w_up", "w_down")]
        y, backward = jax.vjp(lambda x, *rest: moe(x, ids, *rest), x, weights, *experts)
        first = [y, *backward(y)]
        return jax.lax.pmean(sum(array.astype(jnp.float32).mean() for array in first), AXES)

    return jax.shard_map(on_rank, mesh=mesh, in_specs=(specs, TOKENS), out_specs=P())
