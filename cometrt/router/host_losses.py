"""Losses and statistics over NumPy arrays, in float64. `cuda_losses` has the same functions for
CuPy's."""

from __future__ import annotations

from typing import Any

import numpy as np

from cometrt.router.host import check_ids, check_logits, softmax
from cometrt.router.options import Batch


def balance_loss(batch: Batch) -> float:
    p, pairs, factors = _balance_terms(batch)
    return float((factors[:, None] * pairs * p.sum(axis=1)).sum())


def balance_loss_backward(dloss: Any, batch: Batch) -> np.ndarray:
    """dlogits [T, E] float32 = p * factor * (pairs - sum(pairs * p)) * dloss."""
    p, pairs, factors = _balance_terms(batch)
    mean = (pairs[:, None] * p).sum(axis=2, keepdims=True)
    dlogits = dloss * factors[:, None, None] * p * (pairs[:, None] - mean)
    return dlogits.reshape(batch.logits.shape).astype(np.float32)


def z_loss(batch: Batch) -> float:
    logsumexp, counts = _z_terms(check_logits(batch.logits), batch.ids)
    return float((logsumexp[counts] ** 2).sum() / max(counts.sum(), 1))


def z_loss_backward(dloss: Any, batch: Batch) -> np.ndarray:
    """dlogits [T, E] float32 = p * 2 * logsumexp * dloss / tokens."""
    scores = check_logits(batch.logits)
    logsumexp, counts = _z_terms(scores, batch.ids)
    slope = 2.0 * dloss * np.where(counts, logsumexp, 0.0) / max(counts.sum(), 1)
    return (slope[:, None] * softmax(scores)).astype(np.float32)


def load_statistics(ids: np.ndarray, num_experts: int) -> tuple[Any, ...]:
    """Fields of `LoadStatistics`."""
    ids = check_ids("topk_ids", ids, num_experts)
    counts = np.bincount(ids[ids >= 0], minlength=num_experts)
    mean = max(float(counts.mean()), np.finfo(np.float64).tiny)  # no pairs: 0 / tiny
    return (
        counts,
        float(counts.max() / mean),
        float(counts.std() / mean),
        int((counts == 0).sum()),
        float((ids < 0).mean()) if ids.size else 0.0,
    )


def update_bias(bias: np.ndarray, counts: np.ndarray, rate: float) -> None:
    counts = counts.astype(np.float64)
    step = rate * np.sign(counts.mean() - counts)
    bias[...] = (bias.astype(np.float64) + step).astype(bias.dtype)


def _balance_terms(batch: Batch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Probabilities [B, S, E], 0 for padding; pairs [B, E], or [1, E] of the global batch; and
    factors [B] = E / (tokens * all pairs * sequences), of tokens and sequences that count."""
    scores = check_logits(batch.logits)
    num_experts = scores.shape[1]
    kept = _kept(scores, batch.ids)
    p = (kept[:, None] * softmax(scores)).reshape(-1, batch.length, num_experts)
    tokens = kept.reshape(-1, batch.length).sum(axis=1)
    if batch.counts is not None:
        pairs = batch.counts.astype(np.float64)[None]
    else:
        pairs = np.zeros((len(p), num_experts))
        token, k = np.nonzero(batch.ids >= 0)
        np.add.at(pairs, (token // batch.length, batch.ids[token, k]), 1)
    divisor = np.maximum(tokens, 1) * np.maximum(pairs.sum(axis=1), 1.0)
    return p, pairs, num_experts / (divisor * max((tokens > 0).sum(), 1))


def _z_terms(scores: np.ndarray, ids: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """logsumexp [T], 0 for a row of -inf; bool [T], the tokens that count: not padding, and with an
    expert that may be chosen."""
    largest = scores.max(axis=1)
    finite = largest > -np.inf
    shift = np.where(finite, largest, 0.0)
    total = np.exp(scores - shift[:, None]).sum(axis=1)
    return shift + np.log(np.where(finite, total, 1.0)), finite & _kept(scores, ids)


def _kept(scores: np.ndarray, ids: np.ndarray | None) -> np.ndarray:
    """[T] bool: tokens that are not padding."""
    if ids is None:
        return np.ones(len(scores), bool)
    return np.any(check_ids("topk_ids", ids, scores.shape[1]) >= 0, axis=1)
