"""The reference layer: dense NumPy in float64, over all tokens and all experts at once.

Tests compare every executor with it. The formulas are those of docs/architecture.md,
"The mathematics".
"""

from __future__ import annotations

import numpy as np

from cometrt.activations import ACTIVATIONS, activate, activate_backward
from cometrt.specs import Gradients, check_choice


def moe_forward(
    x: np.ndarray,
    topk_ids: np.ndarray,
    topk_weights: np.ndarray,
    w_up: np.ndarray,
    w_down: np.ndarray,
    activation: str,
) -> np.ndarray:
    """Forward of the whole layer in float64: y [T, H], the weighted sum of each token's experts.

    Args:
        x: [T, H], any float dtype.
        topk_ids: [T, K] integers in [-1, E). -1: a dropped pair, which contributes nothing.
        topk_weights: [T, K].
        w_up: [E, 2I, H] with the I gate rows first; [E, I, H] if the activation is not gated.
        w_down: [E, H, I].
        activation: one of the names that ``MoESpec.activation`` allows.

    Raises:
        ValueError: if shapes do not match, an id is out of range or the activation is unknown.
    """
    x, topk_weights, w_up, w_down = _float64(x, topk_weights, w_up, w_down)
    topk_ids = np.asarray(topk_ids)
    _check(x, topk_ids, topk_weights, w_up, w_down, activation)
    share = _shares(topk_ids, topk_weights, len(w_up))  # [T, E]
    a = activate(activation, _pre_activations(x, w_up))  # [T, E, I]
    return _flat(share[:, :, None] * a) @ _down_matrix(w_down)


def moe_backward(
    dy: np.ndarray,
    x: np.ndarray,
    topk_ids: np.ndarray,
    topk_weights: np.ndarray,
    w_up: np.ndarray,
    w_down: np.ndarray,
    activation: str,
) -> Gradients:
    """Backward of the whole layer: the gradients of sum(dy * y) for the y of `moe_forward`.

    Args:
        dy: [T, H], any float dtype.
        x, topk_ids, topk_weights, w_up, w_down, activation: as for `moe_forward`.

    Returns:
        Gradients in float64: x [T, H], topk_weights [T, K] (0 for a dropped pair), w_up and
        w_down in the weights' shapes.

    Raises:
        ValueError: as `moe_forward`, or if dy has another shape than x.
    """
    dy, x, topk_weights, w_up, w_down = _float64(dy, x, topk_weights, w_up, w_down)
    topk_ids = np.asarray(topk_ids)
    _check(x, topk_ids, topk_weights, w_up, w_down, activation)
    if dy.shape != x.shape:
        raise ValueError(f"dy must have x's shape {x.shape} (got {dy.shape})")
    num_experts, up_columns, hidden = w_up.shape
    share = _shares(topk_ids, topk_weights, num_experts)  # [T, E]
    z = _pre_activations(x, w_up)  # [T, E, 2I]
    a = activate(activation, z)  # [T, E, I]
    da = (dy @ _down_matrix(w_down).T).reshape(a.shape)  # da': without the router weight
    dshare = (da * a).sum(axis=2)  # [T, E]
    dz = activate_backward(activation, z, share[:, :, None] * da)  # [T, E, 2I]

    kept = topk_ids >= 0
    dweights = np.where(kept, np.take_along_axis(dshare, np.where(kept, topk_ids, 0), 1), 0.0)
    dw_down = (dy.T @ _flat(share[:, :, None] * a)).reshape(hidden, num_experts, -1)
    return Gradients(
        x=_flat(dz) @ w_up.reshape(-1, hidden),
        topk_weights=dweights,
        w_up=(_flat(dz).T @ x).reshape(num_experts, up_columns, hidden),
        w_down=np.ascontiguousarray(dw_down.transpose(1, 0, 2)),
    )


def _float64(*arrays: np.ndarray) -> list[np.ndarray]:
    return [np.asarray(array).astype(np.float64) for array in arrays]


def _flat(per_expert: np.ndarray) -> np.ndarray:
    return per_expert.reshape(len(per_expert), per_expert.shape[1] * per_expert.shape[2])


def _shares(topk_ids: np.ndarray, topk_weights: np.ndarray, num_experts: int) -> np.ndarray:
    """[T, E]: the weight of each expert for each token, 0 for an expert that was not chosen."""
    share = np.zeros((len(topk_ids), num_experts))
    token, k = np.nonzero(topk_ids >= 0)
    np.add.at(share, (token, topk_ids[token, k]), topk_weights[token, k])
    return share


def _pre_activations(x: np.ndarray, w_up: np.ndarray) -> np.ndarray:
    num_experts, up_columns, hidden = w_up.shape
    return (x @ w_up.reshape(-1, hidden).T).reshape(len(x), num_experts, up_columns)


def _down_matrix(w_down: np.ndarray) -> np.ndarray:
    """w_down as one matrix [E * I, H]."""
    return w_down.transpose(0, 2, 1).reshape(-1, w_down.shape[1])


def _check(
    x: np.ndarray,
    topk_ids: np.ndarray,
    topk_weights: np.ndarray,
    w_up: np.ndarray,
    w_down: np.ndarray,
    activation: str,
) -> None:
    check_choice("activation", activation, tuple(ACTIVATIONS))
    for name, array, ndim in (("x", x, 2), ("w_up", w_up, 3), ("w_down", w_down, 3)):
        if array.ndim != ndim:
            raise ValueError(f"{name} must have {ndim} dimensions (got shape {array.shape})")
    num_experts, hidden, intermediate = w_down.shape
    factor = 2 if ACTIVATIONS[activation][0] else 1
    up_shape = (num_experts, factor * intermediate, hidden)
    if w_up.shape != up_shape:
        raise ValueError(f"w_up must have shape {up_shape} to match w_down (got {w_up.shape})")
    if x.shape[1] != hidden:
        raise ValueError(f"x must have {hidden} columns to match w_down (got shape {x.shape})")
    if topk_ids.ndim != 2 or len(topk_ids) != len(x) or topk_ids.dtype.kind != "i":
        raise ValueError(
            f"topk_ids must be integers of shape ({len(x)}, K) "
            f"(got {topk_ids.dtype} of shape {topk_ids.shape})"
        )
    if topk_weights.shape != topk_ids.shape:
        raise ValueError(
            f"topk_weights must have topk_ids's shape {topk_ids.shape} (got {topk_weights.shape})"
        )
    if topk_ids.size and not -1 <= topk_ids.min() <= topk_ids.max() < num_experts:
        raise ValueError(
            f"topk_ids must lie in [-1, {num_experts}) (got {topk_ids.min()} to {topk_ids.max()})"
        )
