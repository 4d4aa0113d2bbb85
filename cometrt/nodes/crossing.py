"""Which tokens cross between nodes where only wanted ones do (`MoESpec.rail_tokens`), in NumPy.

A node *wants* a token if the token has chosen one of its experts. All nodes want a token that
breaks a rule, so that all of them find it. The wanted tokens of a rank are numbered for each other
node, in the order of tokens: the n-th one crosses to *slot* n. On "cuda" `rail_choose` does the
same (kernels_cu/nodes/rail_choose.cu).
"""

from __future__ import annotations

import numpy as np

from cometrt.errors import CapacityError
from cometrt.specs import MoESpec

NO_SLOT = -1


def slots_of(
    ids: np.ndarray, weights: np.ndarray, spec: MoESpec, nodes: int, node: int
) -> tuple[np.ndarray, int]:
    """The slots of a rank's tokens on the other nodes.

    Args:
        ids, weights: [T, K].
        node: of the rank.

    Returns:
        (slots [N, max_tokens] int32, most): `NO_SLOT` where a node does not want a token, on the
        rank's own node, and behind the last token; the most tokens that one of the nodes wants,
        of which those behind the first `spec.rail_tokens` have no slots.
    """
    wants = wanted(ids, weights, spec, nodes)
    wants[node] = False
    numbers = np.cumsum(wants, axis=1) - 1
    slots = np.full((nodes, spec.max_tokens), NO_SLOT, np.int32)
    fits = wants & (numbers < spec.crossing_tokens)
    slots[:, : len(ids)] = np.where(fits, numbers, NO_SLOT)
    return slots, int(wants.sum(axis=1).max())


def wanted(ids: np.ndarray, weights: np.ndarray, spec: MoESpec, nodes: int) -> np.ndarray:
    """[N, T]: whether that node wants that token."""
    experts = spec.num_experts // nodes
    wrong = ((ids < -1) | (ids >= spec.num_experts) | ~np.isfinite(weights)).any(axis=1)
    for k in range(1, spec.topk):
        wrong |= ((ids[:, :k] == ids[:, k : k + 1]) & (ids[:, k : k + 1] >= 0)).any(axis=1)
    of_node = np.where(ids >= 0, ids // experts, -1)
    return np.stack([wrong | (of_node == node).any(axis=1) for node in range(nodes)])


def too_many_tokens(rank: int, need: int, spec: MoESpec) -> CapacityError:
    """The CapacityError for a rank of which one other node wants `need` tokens."""
    error = CapacityError(
        f"another node wants {need} tokens of rank {rank} but MoESpec.rail_tokens is "
        f"{spec.rail_tokens}: let the router choose nodes more evenly, or raise it"
    )
    error.rank, error.need = rank, need
    error.capacity, error.capacity_factor = spec.crossing_tokens, spec.capacity_factor
    return error
