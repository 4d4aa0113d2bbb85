"""The routing tables of all ranks, and their checks. Every rank reads all of them."""

from __future__ import annotations

import dataclasses

import numpy as np

from cometrt.errors import RoutingError
from cometrt.specs import MoESpec


@dataclasses.dataclass(frozen=True, eq=False)
class RoutingTables:
    """Ids and router weights of all ranks.

    Attributes:
        ids: [W, max_tokens, K] int32; -1 for a dropped pair and after a rank's last token.
        weights: [W, max_tokens, K] float32.
        num_tokens: [W] int32.
    """

    ids: np.ndarray
    weights: np.ndarray
    num_tokens: np.ndarray


def check_routing(tables: RoutingTables, spec: MoESpec, first_rank: int = 0) -> None:
    """Raise a RoutingError for the first invalid pair in the order of (rank, token, k).

    Every rank finds the same pair. `first_rank`: the number of the rank whose tables come first.
    """
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
    raise wrong_pair(first_rank + rank, token, k, ids[rank, token], weights[rank, token, k], spec)


def wrong_pair(
    rank: int, token: int, k: int, token_ids: np.ndarray, weight: float, spec: MoESpec
) -> RoutingError:
    """The error of an invalid pair. `token_ids`: the ids [K] of its token."""
    table, own = "topk_ids", int(token_ids[k])
    if not -1 <= own < spec.num_experts:
        problem = f"must be in [-1, {spec.num_experts}) (got {_shown(own)})"
    elif own >= 0 and own in token_ids[:k]:
        shown = ", ".join(map(_shown, token_ids.tolist()))
        problem = f"must be distinct within the token (got {own} again in [{shown}])"
    else:
        table, problem = "topk_weights", f"must be finite (got {weight})"
    error = RoutingError.build(table, problem, rank=rank, token=token, k=k)
    error.expert_id = own
    return error


def _shown(expert_id: int) -> str:
    """Text of an id. Publishing clips an int64 id to int32, so a limit stands for all beyond it."""
    limits = np.iinfo(np.int32)
    clipped = {limits.min: " or less", limits.max: " or more"}
    return f"{expert_id}{clipped.get(expert_id, '')}"
