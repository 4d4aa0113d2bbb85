"""Top-k routers in NumPy, their backward, and the load statistics a trainer logs.

They fill ``topk_ids`` and ``topk_weights`` of ``MoELayer.forward`` and turn its
``grads.topk_weights`` into the gradient of the logits. Arithmetic is float64 inside; ties go
to the lower expert id, so that routing is repeatable. A masked array is a ValueError: its mask
would be lost.

Sources: softmax top-k as in Switch (arXiv 2101.03961) and Mixtral (arXiv 2401.04088); sigmoid
with a selection bias and group-limited choice as in DeepSeek-V3 (arXiv 2412.19437, 2.1.2).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from cometrt.specs import check_int, check_unmasked


class Routing(NamedTuple):
    """ids [T, K] int32, best first; weights [T, K] float32."""

    ids: np.ndarray
    weights: np.ndarray


def softmax_topk(logits: np.ndarray, topk: int, *, renormalize: bool = True) -> Routing:
    """Softmax over E experts, the `topk` largest kept.

    Args:
        logits: [T, E], finite.
        topk: K, 1 <= K <= E.
        renormalize: make each token's K weights sum to 1 (Mixtral, Qwen3) or keep them as
            probabilities over all E (Qwen2-MoE).

    Raises:
        ValueError: for a wrong shape, K, or a logit that is not finite.
    """
    scores = _check_logits(logits, topk)
    ids = _top(scores, topk)
    if renormalize:
        weights = _softmax(np.take_along_axis(scores, ids, axis=1))
    else:
        weights = np.take_along_axis(_softmax(scores), ids, axis=1)
    return Routing(ids.astype(np.int32), weights.astype(np.float32))


def softmax_topk_backward(
    dweights: np.ndarray, logits: np.ndarray, ids: np.ndarray, *, renormalize: bool = True
) -> np.ndarray:
    """dlogits [T, E] float32, from dweights [T, K] and the arguments and ids of `softmax_topk`.

    The choice of experts is piecewise constant and has no gradient. A pair that was dropped
    after routing takes part with its id from the router and the dweight 0 the layer gives it.

    Raises:
        ValueError: for shapes or ids that do not fit.
    """
    scores, ids, dweights = _check_backward(dweights, logits, ids)
    if renormalize:
        weights = _softmax(np.take_along_axis(scores, ids, axis=1))
        dot = (weights * dweights).sum(axis=1, keepdims=True)
        return _scatter(weights * (dweights - dot), ids, scores.shape).astype(np.float32)
    probabilities = _softmax(scores)
    weights = np.take_along_axis(probabilities, ids, axis=1)
    dot = (weights * dweights).sum(axis=1, keepdims=True)
    direct = _scatter(weights * dweights, ids, scores.shape)
    return (direct - probabilities * dot).astype(np.float32)


def sigmoid_topk(
    logits: np.ndarray,
    bias: np.ndarray,
    topk: int,
    *,
    renormalize: bool = True,
    scale: float = 1.0,
    num_groups: int = 1,
    topk_groups: int = 1,
) -> Routing:
    """Sigmoid affinities; experts chosen by affinity + bias, weighted by affinity alone.

    Args:
        logits: [T, E], finite.
        bias: [E], moved by the trainer to balance the load; it gets no gradient.
        topk: K, at most the experts of `topk_groups` groups.
        renormalize: make each token's K affinities sum to 1 before scaling.
        scale: factor on the weights (DeepSeek-V3: 2.5).
        num_groups, topk_groups: choose only within the `topk_groups` groups of experts, out of
            `num_groups` equal ones, whose two best biased affinities sum highest
            (DeepSeek-V3: 8 and 4). 1 and 1: no limit.

    Raises:
        ValueError: for a wrong shape, K, group count, or a value that is not finite.
    """
    scores = _check_logits(logits, topk)
    num_experts = scores.shape[1]
    check_unmasked("bias", bias)
    bias = np.asarray(bias, dtype=np.float64)
    if bias.shape != (num_experts,) or not np.isfinite(bias).all():
        raise ValueError(f"bias must be finite, of shape ({num_experts},) (got shape {bias.shape})")
    check_int("num_groups", num_groups, minimum=1)
    check_int("topk_groups", topk_groups, minimum=1, maximum=num_groups)
    if num_experts % num_groups:
        raise ValueError(f"num_groups must divide the {num_experts} experts (got {num_groups})")
    if topk > topk_groups * (num_experts // num_groups):
        raise ValueError(
            f"topk must be <= {topk_groups * (num_experts // num_groups)}, the experts of "
            f"{topk_groups} of {num_groups} groups (got {topk})"
        )
    affinity = _sigmoid(scores)
    choice = affinity + bias
    if num_groups > 1:
        grouped = choice.reshape(len(choice), num_groups, num_experts // num_groups)
        best_two = np.sort(grouped, axis=2)[:, :, -2:].sum(axis=2)  # [T, groups]
        allowed = np.zeros_like(best_two, dtype=bool)
        np.put_along_axis(allowed, _top(best_two, topk_groups), True, axis=1)
        choice = np.where(allowed[:, :, None], grouped, -np.inf).reshape(choice.shape)
    ids = _top(choice, topk)
    chosen = np.take_along_axis(scores, ids, axis=1)
    weights = _softmax(_log_sigmoid(chosen)) if renormalize else _sigmoid(chosen)
    return Routing(ids.astype(np.int32), (scale * weights).astype(np.float32))


def sigmoid_topk_backward(
    dweights: np.ndarray,
    logits: np.ndarray,
    ids: np.ndarray,
    *,
    renormalize: bool = True,
    scale: float = 1.0,
) -> np.ndarray:
    """dlogits [T, E] float32, from dweights [T, K] and the arguments and ids of `sigmoid_topk`.

    Raises:
        ValueError: for shapes or ids that do not fit.
    """
    scores, ids, dweights = _check_backward(dweights, logits, ids)
    chosen, dlog = np.take_along_axis(scores, ids, axis=1), scale * dweights
    if renormalize:  # a softmax over log(sigmoid)
        weights = _softmax(_log_sigmoid(chosen))
        dlog = weights * (dlog - (weights * dlog).sum(axis=1, keepdims=True))
    else:
        dlog = _sigmoid(chosen) * dlog
    return _scatter(dlog * _sigmoid(-chosen), ids, scores.shape).astype(np.float32)


class LoadStatistics(NamedTuple):
    """How evenly the experts are loaded.

    Attributes:
        counts: [E] pairs each expert received.
        imbalance: busiest expert over the mean (1 is balanced).
        variation: coefficient of variation of the counts (standard deviation over mean).
        idle: experts that received nothing.
        dropped: share of pairs with id -1, in [0, 1].
    """

    counts: np.ndarray
    imbalance: float
    variation: float
    idle: int
    dropped: float


def load_statistics(topk_ids: np.ndarray, num_experts: int) -> LoadStatistics:
    """Statistics of [T, K] ids; -1 is a dropped pair. All zero where nothing was routed.

    Raises:
        ValueError: for an id outside [-1, num_experts) or a wrong shape.
    """
    check_int("num_experts", num_experts, minimum=1)
    topk_ids = _check_ids("topk_ids", topk_ids, -1, num_experts)
    kept = topk_ids[topk_ids >= 0]
    counts = np.bincount(kept, minlength=num_experts)
    mean = counts.mean()
    return LoadStatistics(
        counts=counts,
        imbalance=float(counts.max() / mean) if mean else 0.0,
        variation=float(counts.std() / mean) if mean else 0.0,
        idle=int((counts == 0).sum()),
        dropped=1.0 - kept.size / topk_ids.size if topk_ids.size else 0.0,
    )


def balance_loss(logits: np.ndarray, topk_ids: np.ndarray) -> float:
    """Switch's auxiliary loss E * sum_e f_e * p_e; 1 when both are uniform, 0 without tokens.

    f_e is the share of kept pairs on expert e, p_e the mean softmax probability over the tokens
    with a kept pair. A token whose K ids are all -1 is padding and counts in neither.

    Args:
        logits: [T, E], finite, also in the rows of padding.
        topk_ids: [T, K] integers in [-1, E); -1 is a dropped pair.

    Raises:
        ValueError: for shapes or ids that do not fit.
    """
    scores = _check_logits(logits, 1)
    topk_ids = _check_ids("topk_ids", topk_ids, -1, scores.shape[1])
    if len(topk_ids) != len(scores):
        raise ValueError(
            f"topk_ids must have {len(scores)} rows, as logits has (got {len(topk_ids)})"
        )
    counts = load_statistics(topk_ids, scores.shape[1]).counts
    if not counts.sum():
        return 0.0
    tokens = scores[(topk_ids >= 0).any(axis=1)]
    return float(scores.shape[1] * (counts / counts.sum()) @ _softmax(tokens).mean(axis=0))


def _softmax(scores: np.ndarray) -> np.ndarray:
    exponent = np.exp(scores - scores.max(axis=1, keepdims=True, initial=-np.inf))
    return exponent / exponent.sum(axis=1, keepdims=True)


def _sigmoid(scores: np.ndarray) -> np.ndarray:
    small = np.exp(-np.abs(scores))  # keeps its digits far below zero
    return np.where(scores >= 0, 1.0, small) / (1.0 + small)


def _log_sigmoid(scores: np.ndarray) -> np.ndarray:
    return np.minimum(scores, 0.0) - np.log1p(np.exp(-np.abs(scores)))


def _top(scores: np.ndarray, count: int) -> np.ndarray:
    return np.argsort(-scores, axis=1, kind="stable")[:, :count]


def _scatter(values: np.ndarray, ids: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    dense = np.zeros(shape)
    np.put_along_axis(dense, ids, values, axis=1)
    return dense


def _check_logits(logits: np.ndarray, topk: int) -> np.ndarray:
    check_unmasked("logits", logits)
    scores = np.asarray(logits).astype(np.float64)
    if scores.ndim != 2 or scores.shape[1] < 1:
        raise ValueError(f"logits must have shape (T, E), E >= 1 (got {scores.shape})")
    if not np.isfinite(scores).all():
        raise ValueError(f"logits must be finite (got {scores[~np.isfinite(scores)][0]})")
    check_int("topk", topk, minimum=1, maximum=scores.shape[1])
    return scores


def _check_ids(name: str, ids: np.ndarray, lowest: int, num_experts: int) -> np.ndarray:
    check_unmasked(name, ids)
    ids = np.asarray(ids)
    if ids.ndim != 2 or ids.dtype.kind != "i":
        raise ValueError(
            f"{name} must be integers of shape (T, K) (got {ids.dtype} of shape {ids.shape})"
        )
    if ids.size and not lowest <= ids.min() <= ids.max() < num_experts:
        raise ValueError(
            f"{name} must lie in [{lowest}, {num_experts}) (got {ids.min()} to {ids.max()})"
        )
    return ids


def _check_backward(
    dweights: np.ndarray, logits: np.ndarray, ids: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    scores = _check_logits(logits, 1)
    ids = _check_ids("ids", ids, 0, scores.shape[1])
    check_unmasked("dweights", dweights)
    dweights = np.asarray(dweights).astype(np.float64)
    if len(ids) != len(scores) or dweights.shape != ids.shape:
        raise ValueError(
            f"dweights and ids must have the same shape ({len(scores)}, K) "
            f"(got {dweights.shape} and {ids.shape})"
        )
    ordered = np.sort(ids, axis=1)
    if (ordered[:, 1:] == ordered[:, :-1]).any():
        raise ValueError("ids must be distinct within a token (got a repeated id)")
    return scores, ids, dweights
