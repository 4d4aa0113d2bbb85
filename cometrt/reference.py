"""The reference layer: NumPy in float64, one expert after the other, over all tokens.

Tests compare every executor with it. The formulas are those of docs/architecture.md,
"The mathematics".
"""

from __future__ import annotations

from collections.abc import Iterator

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
    x, topk_weights = _float64(x, topk_weights)
    topk_ids, w_up, w_down = map(np.asarray, (topk_ids, w_up, w_down))
    _check(x, topk_ids, topk_weights, w_up, w_down, activation)
    y = np.zeros_like(x)
    for expert, token, k in _rows_of_experts(topk_ids, len(w_up)):
        up, down = _float64(w_up[expert], w_down[expert])
        a = activate(activation, x[token] @ up.T)  # [rows, I]
        np.add.at(y, token, (topk_weights[token, k, None] * a) @ down.T)
    return y


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
    dy, x, topk_weights = _float64(dy, x, topk_weights)
    topk_ids, w_up, w_down = map(np.asarray, (topk_ids, w_up, w_down))
    _check(x, topk_ids, topk_weights, w_up, w_down, activation)
    if dy.shape != x.shape:
        raise ValueError(f"dy must have x's shape {x.shape} (got {dy.shape})")
    dx, dweights = np.zeros_like(x), np.zeros_like(topk_weights)
    dw_up, dw_down = np.zeros(w_up.shape), np.zeros(w_down.shape)
    for expert, token, k in _rows_of_experts(topk_ids, len(w_up)):
        up, down = _float64(w_up[expert], w_down[expert])
        weights = topk_weights[token, k, None]  # [rows, 1]
        z = x[token] @ up.T  # [rows, 2I]
        a = activate(activation, z)  # [rows, I]
        da = dy[token] @ down  # da': without the router weight
        dz = activate_backward(activation, z, weights * da)
        dweights[token, k] = (da * a).sum(axis=1)
        np.add.at(dx, token, dz @ up)
        dw_up[expert] = dz.T @ x[token]
        dw_down[expert] = dy[token].T @ (weights * a)
    return Gradients(dx, dweights, dw_up, dw_down)


def _float64(*arrays: np.ndarray) -> list[np.ndarray]:
    return [np.asarray(array).astype(np.float64) for array in arrays]


def _rows_of_experts(
    topk_ids: np.ndarray, num_experts: int
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(expert, tokens [rows], k [rows]): the pairs of each expert that has any."""
    expert_of_row = topk_ids.ravel()
    order = np.argsort(expert_of_row, kind="stable")
    bounds = np.searchsorted(expert_of_row[order], np.arange(num_experts + 1))
    for expert in range(num_experts):
        if len(pairs := order[bounds[expert] : bounds[expert + 1]]):
            yield expert, *np.divmod(pairs, topk_ids.shape[1])


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
