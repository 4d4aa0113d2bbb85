"""Top-k routers in NumPy, their backward, and statistics of the experts' load.

A router computes ``topk_ids`` and ``topk_weights`` for ``MoELayer.forward`` from logits. Its
backward turns ``grads.topk_weights`` into the gradient of the logits. All functions compute in
float64. Of equal scores the lower expert id wins, so routing is deterministic. A masked array is a
ValueError, because NumPy would drop its mask.

Sources: softmax top-k as in Switch (arXiv 2101.03961) and Mixtral (arXiv 2401.04088); sigmoid
with a selection bias and group-limited choice as in DeepSeek-V3 (arXiv 2412.19437, 2.1.2).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from cometrt.specs import check_int, check_unmasked


class Routing(NamedTuple):
    """A router's result: ids [T, K] int32, highest score first, and weights [T, K] float32."""

    ids: np.ndarray
    weights: np.ndarray


def softmax_topk(logits: np.ndarray, topk: int, *, renormalize: bool = True) -> Routing:
    """Choose the K experts with the largest softmax probabilities.

    Args:
        logits: [T, E], finite.
        topk: K, 1 <= K <= E.
        renormalize: True: divide each token's K weights by their sum (Mixtral, Qwen3). False:
            the weights are the probabilities over all E experts (Qwen2-MoE).

    Raises:
        ValueError: for a wrong shape or K, or a logit that is not finite.
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
    """Gradient of the logits, dlogits [T, E] float32, for `softmax_topk`.

    The choice of experts is piecewise constant and has no gradient.

    Args:
        dweights: [T, K], the gradient of the weights: ``grads.topk_weights``.
        logits, renormalize: the arguments of `softmax_topk`.
        ids: [T, K], its ids. For a pair that was dropped after routing pass the router's id; its
            dweight is 0.

    Raises:
        ValueError: if shapes do not match, an id is outside [0, E) or repeated within a token.
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
    """Choose the K experts with the largest sigmoid(logit) + bias. The weights omit the bias.

    Args:
        logits: [T, E], finite.
        bias: [E], which the trainer adjusts to balance the load. It gets no gradient.
        topk: K, at most the number of experts in `topk_groups` groups.
        renormalize: divide each token's K sigmoids by their sum, before scaling.
        scale: factor on the weights (DeepSeek-V3: 2.5).
        num_groups, topk_groups: group-limited choice. The E experts form `num_groups` equal
            groups. A group's score is the sum of its two largest biased sigmoids. Only experts
            of the `topk_groups` best groups are chosen (DeepSeek-V3: 8 and 4). 1 and 1: no limit.

    Raises:
        ValueError: for a wrong shape, K or group count, or a value that is not finite.
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
    """Gradient of the logits, dlogits [T, E] float32, for `sigmoid_topk`.

    Args:
        dweights, ids: [T, K], as for `softmax_topk_backward`.
        logits, renormalize, scale: the arguments of `sigmoid_topk`.

    Raises:
        ValueError: as `softmax_topk_backward`.
    """
    scores, ids, dweights = _check_backward(dweights, logits, ids)
    chosen, dlog = np.take_along_axis(scores, ids, axis=1), scale * dweights
    if renormalize:  # the weights are softmax(log(sigmoid(chosen)))
        weights = _softmax(_log_sigmoid(chosen))
        dlog = weights * (dlog - (weights * dlog).sum(axis=1, keepdims=True))
    else:
        dlog = _sigmoid(chosen) * dlog
    return _scatter(dlog * _sigmoid(-chosen), ids, scores.shape).astype(np.float32)


class LoadStatistics(NamedTuple):
    """Distribution of the pairs over the experts.

    Attributes:
        counts: [E] number of pairs of each expert.
        imbalance: largest count divided by the mean count; 1: balanced.
        variation: coefficient of variation of the counts: standard deviation / mean.
        idle: number of experts without a pair.
        dropped: fraction of pairs with id -1, in [0, 1].
    """

    counts: np.ndarray
    imbalance: float
    variation: float
    idle: int
    dropped: float


def load_statistics(topk_ids: np.ndarray, num_experts: int) -> LoadStatistics:
    """Load statistics of topk_ids [T, K], where -1 is a dropped pair. Without any pair all are 0.

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
    """The load-balancing loss of Switch: E * sum_e f_e * p_e. 1: uniform; 0: no tokens.

    f_e is the fraction of kept pairs on expert e. p_e is the mean softmax probability of e over
    the tokens that have a kept pair. A token whose K ids are all -1 is padding and does not count.

    Args:
        logits: [T, E], finite, also in rows of padding tokens.
        topk_ids: [T, K] integers in [-1, E). -1: a dropped pair.

    Raises:
        ValueError: if shapes do not match or an id is out of range.
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
    small = np.exp(-np.abs(scores))  # does not overflow, and stays exact for very negative scores
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
