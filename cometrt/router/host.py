"""Routers and losses over NumPy arrays, in float64. `cuda` has the same functions for CuPy's."""

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
        return (direct - _softmax(allowed) * mean).astype(np.float32)
    if options.renormalize:
        dweights = dweights - mean
    dchosen = found * dweights * _log_slope(chosen, options.kind)
    return _scatter(dchosen, ids, allowed.shape).astype(np.float32)


# ---- losses ------------------------------------------------------------------------------------


def loss_sums(logits: np.ndarray, ids: np.ndarray | None, sequence_tokens: int) -> np.ndarray:
    """[B, 2 E + 3] float64: what the losses need of each sequence.

    [:E]: each expert's sum of probabilities. [E:2E]: each expert's number of pairs. Then the number
    of tokens, the sum of logsumexp^2, and the number of tokens in that sum. Tokens whose ids are
    all -1 count nowhere. Tokens whose logits are all -inf are left out of the last two. ids None:
    every token counts.
    """
    scores = check_logits(logits)
    num_tokens, num_experts = scores.shape
    num_sequences = num_tokens // sequence_tokens
    kept = _kept(scores, ids)
    squares = kept & (scores > -np.inf).any(axis=1)
    by_token = np.zeros((num_tokens, 2 * num_experts + 3))
    by_token[:, :num_experts] = kept[:, None] * _softmax(scores)
    if ids is not None:
        token, k = np.nonzero(ids >= 0)
        np.add.at(by_token, (token, num_experts + ids[token, k]), 1)
    by_token[:, -3], by_token[:, -1] = kept, squares
    by_token[:, -2] = squares * _logsumexp(scores) ** 2
    return by_token.reshape(num_sequences, sequence_tokens, by_token.shape[1]).sum(axis=1)


def loss_backward(
    logits: np.ndarray,
    ids: np.ndarray | None,
    sequence_tokens: int,
    balance: tuple[np.ndarray, np.ndarray] | None,
    z_factor: np.ndarray | None,
) -> np.ndarray:
    """dlogits [T, E] float32 = p * (factor * (f - sum(f * p)) + z_factor * logsumexp).

    Args:
        balance: of the balance loss: fractions f [B, E], or [1, E] for all sequences, and factors
            [B]. None: no balance loss.
        z_factor: of the z-loss, [1]. None: no z-loss.
    """
    scores = check_logits(logits)
    p, slope = _softmax(scores), np.zeros(scores.shape)
    if balance is not None:
        fractions, factors = balance
        sequence = np.arange(len(scores)) // sequence_tokens
        f = fractions[sequence if len(fractions) > 1 else np.zeros_like(sequence)]
        slope += factors[sequence, None] * (f - (f * p).sum(axis=1, keepdims=True))
    if z_factor is not None:
        slope += z_factor * _logsumexp(scores)[:, None]
    return (_kept(scores, ids)[:, None] * p * slope).astype(np.float32)


def _kept(scores: np.ndarray, ids: np.ndarray | None) -> np.ndarray:
    """[T] bool: tokens that are not padding."""
    if ids is None:
        return np.ones(len(scores), bool)
    return np.any(check_ids("topk_ids", ids, scores.shape[1]) >= 0, axis=1)


def _logsumexp(scores: np.ndarray) -> np.ndarray:
    """[T]; 0 for a row of -inf."""
    largest = scores.max(axis=1)
    largest = np.where(largest > -np.inf, largest, 0.0)
    total = np.exp(scores - largest[:, None]).sum(axis=1)
    return largest + np.log(np.where(total > 0, total, 1.0))


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
    """`choice` [T, E], with -inf outside the best groups of each token."""
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
    """Indices of the largest scores of each row, the largest first; of equal ones the lower."""
    return np.argsort(-scores, axis=1, kind="stable")[:, :count]


def _distinct(ids: np.ndarray) -> np.ndarray:
    ordered = np.sort(ids, axis=1)
    if ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any():
        raise ValueError("ids must be distinct within a token (got a repeated id)")
    return ids


# ---- scores --------------------------------------------------------------------------------------


def _scores(logits: np.ndarray, kind: str) -> np.ndarray:
    if kind == "softmax":
        return _softmax(logits)
    return _sigmoid(logits) if kind == "sigmoid" else np.sqrt(_softplus(logits))


def _weights(allowed: np.ndarray, ids: np.ndarray, options: Options) -> np.ndarray:
    """Unscaled weights [T, K] in float64; 0 where there is no expert."""
    chosen = _take(allowed, ids)
    if options.renormalize:
        return _softmax(_log_scores(chosen, options.kind))
    if options.kind == "softmax":
        found = _take(_softmax(allowed), ids)
    else:
        found = _scores(chosen, options.kind)
    return np.where(chosen > -np.inf, found, 0.0)


def _log_scores(logits: np.ndarray, kind: str) -> np.ndarray:
    """log(score), up to a constant of the token, which renormalisation cancels."""
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


def _softmax(scores: np.ndarray) -> np.ndarray:
    """Softmax over each row; 0 in a row of -inf."""
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
