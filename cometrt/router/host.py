"""Routers over NumPy arrays, in float64. `cuda` has the same functions for CuPy's."""

from __future__ import annotations

import numpy as np

from cometrt.router.options import Options

FAR = -20.0  # below it, softplus(x) is exp(x) * (1 - exp(x) / 2) in float64


def check_logits(logits: np.ndarray) -> np.ndarray:
    """Logits [T, E] as float64."""
    scores = np.asarray(logits).astype(np.float64)
    wrong = ~(scores < np.inf)  # also NaN
    if wrong.any():
        raise ValueError(f"logits must be finite, or -inf where masked (got {scores[wrong][0]})")
    return scores


def check_ids(name: str, ids: np.ndarray, num_experts: int) -> np.ndarray:
    """Check that ids [T, K] lie in [-1, E)."""
    if ids.size and not -1 <= ids.min() <= ids.max() < num_experts:
        raise ValueError(f"{name} must lie in [-1, {num_experts}) (got {ids.min()} to {ids.max()})")
    return ids


def topk(logits: np.ndarray, count: int, options: Options) -> tuple[np.ndarray, np.ndarray]:
    """ids [T, K] int32 and weights [T, K] float32."""
    allowed = _allowed(logits, options)
    choice = allowed
    if options.by_score:
        choice = np.where(allowed > -np.inf, _scores(allowed, options.kind), -np.inf)
        choice += _bias(options, logits.shape[1])
    if options.num_groups > 1:
        choice = _limit_to_groups(choice, options)
    ids = _top(choice, count)
    ids = np.where(np.take_along_axis(choice, ids, axis=1) > -np.inf, ids, -1)
    weights = options.scale * _weights(allowed, ids, options)
    return ids.astype(np.int32), weights.astype(np.float32)


def weights(logits: np.ndarray, ids: np.ndarray, options: Options) -> np.ndarray:
    """Weights [T, K] float32 of given ids."""
    allowed = _allowed(logits, options)
    ids = _distinct(check_ids("ids", ids, logits.shape[1]))
    return (options.scale * _weights(allowed, ids, options)).astype(np.float32)


def backward(
    dweights: np.ndarray, logits: np.ndarray, ids: np.ndarray, options: Options
) -> np.ndarray:
    """dlogits [T, E] float32."""
    allowed = _allowed(logits, options)
    ids = _distinct(check_ids("ids", ids, logits.shape[1]))
    chosen = _take(allowed, ids)
    found = _weights(allowed, ids, options)
    dweights = options.scale * np.where(chosen > -np.inf, dweights, 0.0).astype(np.float64)
    mean = (found * dweights).sum(axis=1, keepdims=True)
    if options.kind == "softmax" and not options.renormalize:
        direct = _scatter(found * dweights, ids, allowed.shape)
        return (direct - softmax(allowed) * mean).astype(np.float32)
    if options.renormalize:
        dweights = dweights - mean
    dchosen = found * dweights * _log_slope(chosen, options.kind)
    return _scatter(dchosen, ids, allowed.shape).astype(np.float32)


# ---- choice ------------------------------------------------------------------------------------


def _allowed(logits: np.ndarray, options: Options) -> np.ndarray:
    """Logits in float64, -inf where an expert is masked."""
    scores = check_logits(logits)
    return scores if options.mask is None else np.where(options.mask, scores, -np.inf)


def _bias(options: Options, num_experts: int) -> np.ndarray:
    if options.bias is None:
        return np.zeros(num_experts)
    bias = np.asarray(options.bias, dtype=np.float64)
    if not np.isfinite(bias).all():
        raise ValueError(
            f"bias must be finite, of shape ({num_experts},) (got {bias[~np.isfinite(bias)][0]})"
        )
    return bias


def _limit_to_groups(choice: np.ndarray, options: Options) -> np.ndarray:
    """`choice`, -inf outside the best groups of each token."""
    num_tokens, num_experts = choice.shape
    grouped = choice.reshape(num_tokens, options.num_groups, num_experts // options.num_groups)
    score = grouped.max(axis=2)  # [T, groups]
    if options.group_score == "top2" and grouped.shape[2] > 1:
        best_two = np.sort(grouped, axis=2)[:, :, -2:]
        score = np.where(best_two[:, :, 0] > -np.inf, best_two.sum(axis=2), score)
    allowed = np.zeros(score.shape, dtype=bool)
    np.put_along_axis(allowed, _top(score, options.topk_groups), True, axis=1)
    return np.where(allowed[:, :, None], grouped, -np.inf).reshape(choice.shape)


def _top(scores: np.ndarray, count: int) -> np.ndarray:
    return np.argsort(-scores, axis=1, kind="stable")[:, :count]


def _distinct(ids: np.ndarray) -> np.ndarray:
    ordered = np.sort(ids, axis=1)
    if ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any():
        raise ValueError("ids must be distinct within a token (got a repeated id)")
    return ids


# ---- scores --------------------------------------------------------------------------------------


def _scores(logits: np.ndarray, kind: str) -> np.ndarray:
    if kind == "softmax":
        return softmax(logits)
    return _sigmoid(logits) if kind == "sigmoid" else np.sqrt(_softplus(logits))


def _weights(allowed: np.ndarray, ids: np.ndarray, options: Options) -> np.ndarray:
    """Unscaled weights [T, K] in float64; 0 where there is no expert."""
    chosen = _take(allowed, ids)
    if options.renormalize:
        return softmax(_log_scores(chosen, options.kind))
    if options.kind == "softmax":
        found = _take(softmax(allowed), ids)
    else:
        found = _scores(chosen, options.kind)
    return np.where(chosen > -np.inf, found, 0.0)


def _log_scores(logits: np.ndarray, kind: str) -> np.ndarray:
    """Up to a constant of the token, which renormalisation cancels."""
    if kind == "softmax":
        return logits
    if kind == "sigmoid":
        return np.minimum(logits, 0.0) - np.log1p(np.exp(-np.abs(logits)))
    far = logits - 0.5 * np.exp(np.minimum(logits, FAR))
    return 0.5 * np.where(logits < FAR, far, np.log(_softplus(np.maximum(logits, FAR))))


def _log_slope(logits: np.ndarray, kind: str) -> np.ndarray:
    """d log(score) / d logit, without the softmax's normaliser."""
    if kind == "softmax":
        return np.ones_like(logits)
    if kind == "sigmoid":
        return _sigmoid(-logits)
    near = np.maximum(logits, FAR)
    far = 1.0 - 0.5 * np.exp(np.minimum(logits, FAR))
    return 0.5 * np.where(logits < FAR, far, _sigmoid(near) / _softplus(near))


def softmax(scores: np.ndarray) -> np.ndarray:
    """Over each row; 0 in a row of -inf."""
    largest = scores.max(axis=1, keepdims=True, initial=-np.inf)
    exponent = np.exp(scores - np.where(largest > -np.inf, largest, 0.0))
    total = exponent.sum(axis=1, keepdims=True)
    return exponent / np.where(total > 0, total, 1.0)


def _sigmoid(scores: np.ndarray) -> np.ndarray:
    small = np.exp(-np.abs(scores))  # does not overflow, and stays exact for very negative scores
    return np.where(scores >= 0, 1.0, small) / (1.0 + small)


def _softplus(scores: np.ndarray) -> np.ndarray:
    return np.maximum(scores, 0.0) + np.log1p(np.exp(-np.abs(scores)))


def _take(values: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """values [T, E] at ids [T, K]; -inf for an id -1."""
    return np.where(ids >= 0, np.take_along_axis(values, np.maximum(ids, 0), axis=1), -np.inf)


def _scatter(values: np.ndarray, ids: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Dense [T, E] of values [T, K] at ids; those of an id -1 are dropped."""
    dense = np.zeros((shape[0], shape[1] + 1))
    np.put_along_axis(dense, np.where(ids < 0, shape[1], ids), values, axis=1)
    return dense[:, :-1]
