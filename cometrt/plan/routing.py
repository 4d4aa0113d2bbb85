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
    where = f"of rank {rank}, token {token}, k {k}"
    if outside[rank, token, k]:
        rule = f"must be in [-1, {spec.num_experts})"
        raise RoutingError(f"topk_ids {where} {rule} (got {ids[rank, token, k]})")
    if repeated[rank, token, k]:
        raise RoutingError(
            f"topk_ids {where} must be distinct within the token "
            f"(got {ids[rank, token, k]} again in {ids[rank, token].tolist()})"
        )
    raise RoutingError(f"topk_weights {where} must be finite (got {weights[rank, token, k]})")
