"""All ranks' routing tables, as every rank reads them, and what can be wrong with them."""

from __future__ import annotations

import dataclasses

import numpy as np

from cometrt.errors import RoutingError
from cometrt.specs import MoESpec


@dataclasses.dataclass(frozen=True, eq=False)
class RoutingTables:
    """ids [W, max_tokens, K] int32 (-1 past a rank's tokens), weights likewise float32,
    num_tokens [W] int32."""

    ids: np.ndarray
    weights: np.ndarray
    num_tokens: np.ndarray


def check_routing(tables: RoutingTables, spec: MoESpec) -> None:
    """Raise RoutingError for the first wrong pair by (rank, token, k): the same on every rank."""
    ids, weights = tables.ids, tables.weights
    used = np.arange(ids.shape[1]) < tables.num_tokens[:, None]  # [W, max_tokens]
    outside = (ids < -1) | (ids >= spec.num_experts)
    repeated = np.zeros_like(outside)
    for k in range(1, spec.topk):
        same = (ids[:, :, :k] == ids[:, :, k : k + 1]) & (ids[:, :, k : k + 1] >= 0)
        repeated[:, :, k] = same.any(axis=2)
    wrong = (outside | repeated | ~np.isfinite(weights)) & used[:, :, None]
    if not wrong.any():
        return
    rank, token, k = (int(index[0]) for index in np.nonzero(wrong))
    raise wrong_pair(rank, token, k, ids[rank, token], weights[rank, token, k], spec)


def wrong_pair(
    rank: int, token: int, k: int, token_ids: np.ndarray, weight: float, spec: MoESpec
) -> RoutingError:
    """What is wrong with that pair, of a token with those ids [K]; something is."""
    where, own = f"of rank {rank}, token {token}, k {k}", int(token_ids[k])
    if not -1 <= own < spec.num_experts:
        return RoutingError(
            f"topk_ids {where} must be in [-1, {spec.num_experts}) (got {_shown(own)})"
        )
    if own >= 0 and own in token_ids[:k]:
        return RoutingError(
            f"topk_ids {where} must be distinct within the token "
            f"(got {own} again in [{', '.join(map(_shown, token_ids.tolist()))}])"
        )
    return RoutingError(f"topk_weights {where} must be finite (got {weight})")


def _shown(expert_id: int) -> str:
    """As ranks know it: an int64 id that int32 cannot hold was clipped when it was published."""
    limits = np.iinfo(np.int32)
    clipped = {limits.min: " or less", limits.max: " or more"}
    return f"{expert_id}{clipped.get(expert_id, '')}"
