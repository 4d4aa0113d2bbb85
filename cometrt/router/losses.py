"""Losses of routers, their backward, loss-free balancing, and statistics of the experts' load.

All take NumPy or CuPy arrays and compute in float64. With NumPy a wrong value is a ValueError and
scalars are floats. With CuPy nothing waits for the GPU: scalars are arrays of no dimension, wrong
logits give NaN, and ids outside [0, E) count as dropped. So a call can be captured in a CUDA graph,
after a first one that lets CuPy compile its kernels.

A token whose K ids are all -1 is padding: no loss counts it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from cometrt.router import cuda, host
from cometrt.router.options import check_ids_form, check_library, check_shape, on_device
from cometrt.specs import check_int, check_positive, check_unmasked


class LoadStatistics(NamedTuple):
    """Distribution of the pairs over the experts.

    Attributes:
        counts: [E] integers, the pairs of each expert.
        imbalance: the largest count divided by the mean count. 1: perfectly balanced.
        variation: standard deviation of the counts divided by their mean.
        idle: the number of experts without a pair.
        dropped: fraction of ids that are -1.
    """

    counts: Any
    imbalance: Any
    variation: Any
    idle: Any
    dropped: Any


def load_statistics(topk_ids: Any, num_experts: int) -> LoadStatistics:
    """Count the pairs of each expert. All are 0 for no tokens.

    Args:
        topk_ids: [T, K] integers in [-1, E). -1: a dropped pair. To see all ranks' load, pass the
            ids of all ranks, concatenated.
        num_experts: E.

    Raises:
        ValueError: for ids of another shape or dtype, with NumPy also for ids out of range.
    """
    check_unmasked("topk_ids", topk_ids)
    num_experts = check_int("num_experts", num_experts, minimum=1)
    device = on_device(topk_ids)
    ids = topk_ids if device else np.asarray(topk_ids)
    check_ids_form("topk_ids", ids, len(ids))
    counts = _counts(_checked_ids(ids, num_experts, device), num_experts, device)
    xp = _library(device)
    mean = xp.maximum(counts.mean(), np.finfo(np.float64).tiny)  # no pairs: 0 / tiny
    kept = counts.sum() / max(ids.size, 1)
    found = LoadStatistics(
        counts=counts,
        imbalance=counts.max() / mean,
        variation=counts.std() / mean,
        idle=(counts == 0).sum(),
        dropped=(1.0 if ids.size else 0.0) - kept,
    )
    if device:
        return found
    return LoadStatistics(
        counts=counts,
        imbalance=float(found.imbalance),
        variation=float(found.variation),
        idle=int(found.idle),
        dropped=float(found.dropped),
    )


def balance_loss(
    logits: Any, topk_ids: Any, *, per_sequence: int | None = None, counts: Any = None
) -> Any:
    """The load-balancing loss of Switch: E * sum_e f_e * p_e. 1: uniform; 0: no tokens.

    f_e is the fraction of kept pairs on expert e. p_e is the mean softmax probability of e over
    the tokens that are not padding.

    Args:
        logits: [T, E]; finite, or -inf where an expert is masked, also in rows of padding.
        topk_ids: [T, K] integers in [-1, E). -1: a dropped pair.
        per_sequence: S: each S consecutive tokens are a sequence, and the loss is the mean over
            the sequences that have a kept pair (DeepSeek-V3). S must divide T. None: all tokens
            are one sequence.
        counts: [E], for the balance of the global batch: pairs of each expert, as
            `load_statistics` counts them, summed over ranks and micro-batches. f_e follows them,
            and p_e this rank's tokens. None: the counts of topk_ids. Not with per_sequence.

    Raises:
        ValueError: for wrong shapes or dtypes, with NumPy also for values out of range.
    """
    terms = _balance(logits, topk_ids, per_sequence, counts)
    loss = (terms.fractions * terms.means).sum() * terms.num_experts
    return loss if terms.device else float(loss)


def balance_loss_backward(
    dloss: Any,
    logits: Any,
    topk_ids: Any,
    *,
    per_sequence: int | None = None,
    counts: Any = None,
) -> Any:
    """Gradient of the logits, dlogits [T, E] float32, for `balance_loss`. Fractions f have none.

    Args:
        dloss: a number, or a CuPy array of no dimension: the loss's coefficient in the total loss.
        logits, topk_ids, per_sequence, counts: the arguments of `balance_loss`.

    Raises:
        ValueError: as `balance_loss`.
    """
    terms = _balance(logits, topk_ids, per_sequence, counts)
    p, f = terms.probabilities, terms.fractions[:, None]  # [B, S, E], [B, 1, E]
    mean = (p * f).sum(axis=2, keepdims=True)
    scale = terms.num_experts * terms.shares[:, :, None] * dloss
    return (scale * p * (f - mean)).reshape(logits.shape).astype(np.float32)


def z_loss(logits: Any, topk_ids: Any = None) -> Any:
    """The mean over tokens of logsumexp(logits)^2 (ST-MoE, arXiv 2202.08906). 0 for no tokens.

    Args:
        logits: [T, E]; finite, or -inf where an expert is masked.
        topk_ids: [T, K], to leave out padding. None: every token counts.

    Raises:
        ValueError: for wrong shapes or dtypes, with NumPy also for values out of range.
    """
    _, logsumexp, shares, device = _z_terms(logits, topk_ids)
    loss = (shares * logsumexp**2).sum()
    return loss if device else float(loss)


def z_loss_backward(dloss: Any, logits: Any, topk_ids: Any = None) -> Any:
    """Gradient of the logits, dlogits [T, E] float32, for `z_loss`.

    Args:
        dloss: a number, or a CuPy array of no dimension: the loss's coefficient in the total loss.
        logits, topk_ids: the arguments of `z_loss`.

    Raises:
        ValueError: as `z_loss`.
    """
    probabilities, logsumexp, shares, _ = _z_terms(logits, topk_ids)
    scale = (2.0 * shares * logsumexp * dloss)[:, None]
    return (scale * probabilities).astype(np.float32)


def update_bias(bias: Any, counts: Any, *, rate: float = 1e-3) -> None:
    """Loss-free balancing: add rate * sign(mean(counts) - counts) to `bias`, in place.

    The bias of a `..._topk` call then rises for experts with few pairs (DeepSeek-V3, 0.001).

    Args:
        bias: [E], floating, the same on all ranks.
        counts: [E], pairs of each expert, summed over all ranks since the last update: so all
            ranks keep the same bias.
        rate: > 0.

    Raises:
        ValueError: for another shape, library or dtype, or a rate that is not > 0.
    """
    check_unmasked("bias", bias)
    device = on_device(bias)
    if not (device or isinstance(bias, np.ndarray)):
        raise ValueError(f"bias must be a NumPy or CuPy array (got {type(bias)!r})")
    if bias.ndim != 1 or bias.dtype not in cuda.DTYPES:
        raise ValueError(
            f"bias must be floating, of shape (E,) (got {bias.dtype} of shape {bias.shape})"
        )
    counts = _check_counts(counts, len(bias), device)
    rate = check_positive("rate", rate)
    xp = _library(device)
    step = rate * xp.sign(counts.mean() - counts)
    bias[...] = (bias.astype(np.float64) + step).astype(bias.dtype)


# ---- what losses have in common ------------------------------------------------------------------


class _Balance(NamedTuple):
    """B sequences of S tokens.

    Attributes:
        probabilities: [B, S, E], the softmax.
        shares: [B, S], the weight of each token in the mean over all; 0 for padding.
        means: [B, E], sum of shares * probabilities.
        fractions: [B, E], or [1, E] with counts of the global batch.
    """

    probabilities: Any
    shares: Any
    means: Any
    fractions: Any
    num_experts: int
    device: bool


def _balance(logits: Any, topk_ids: Any, per_sequence: int | None, counts: Any) -> _Balance:
    scores, device = _checked_logits(logits)
    num_tokens, num_experts = scores.shape
    ids = check_library("topk_ids", topk_ids, device)
    check_ids_form("topk_ids", ids, num_tokens)
    ids = _checked_ids(ids, num_experts, device)
    xp = _library(device)
    length = num_tokens
    if per_sequence is not None:
        length = check_int("per_sequence", per_sequence, minimum=1)
        if counts is not None:
            raise ValueError("counts must be None with per_sequence (got both)")
        if num_tokens % length:
            raise ValueError(f"per_sequence must divide the {num_tokens} tokens (got {length})")
    num_sequences = num_tokens // length if length else 1
    kept = ((ids >= 0) & (ids < num_experts)).any(axis=1).reshape(num_sequences, length)
    tokens = kept.sum(axis=1)  # [B]
    shares = kept / (xp.maximum(tokens, 1) * xp.maximum((tokens > 0).sum(), 1))[:, None]
    probabilities = _softmax(scores, xp)[0].reshape(num_sequences, length, num_experts)
    if counts is None:
        by_sequence = ids.reshape(num_sequences, length * ids.shape[1])
        first = xp.arange(num_sequences)[:, None] * num_experts
        by_sequence = xp.where(
            (by_sequence >= 0) & (by_sequence < num_experts), by_sequence + first, -1
        )
        found = _counts(by_sequence, num_sequences * num_experts, device)
        found = found.reshape(num_sequences, num_experts)
    else:
        found = _check_counts(counts, num_experts, device)[None]
    return _Balance(
        probabilities=probabilities,
        shares=shares,
        means=(shares[:, :, None] * probabilities).sum(axis=1),
        fractions=found / xp.maximum(found.sum(axis=1, keepdims=True), 1),
        num_experts=num_experts,
        device=device,
    )


def _z_terms(logits: Any, topk_ids: Any) -> tuple[Any, Any, Any, bool]:
    """The softmax [T, E], logsumexp [T], and the weight of each token in the mean [T]."""
    scores, device = _checked_logits(logits)
    xp = _library(device)
    probabilities, logsumexp = _softmax(scores, xp)
    counted = scores.max(axis=1) > -np.inf  # some expert is not masked
    if topk_ids is not None:
        ids = check_library("topk_ids", topk_ids, device)
        check_ids_form("topk_ids", ids, len(scores))
        _checked_ids(ids, scores.shape[1], device)
        counted = counted & (ids >= 0).any(axis=1)
    return probabilities, logsumexp, counted / xp.maximum(counted.sum(), 1), device


def _softmax(scores: Any, xp: Any) -> tuple[Any, Any]:
    """Of each row, and its logsumexp; 0 and 0 in a row of -inf."""
    largest = scores.max(axis=1, keepdims=True)
    largest = xp.where(largest == -np.inf, 0.0, largest)
    exponent = xp.exp(scores - largest)
    total = exponent.sum(axis=1, keepdims=True)
    total = xp.where(total == 0, 1.0, total)
    return exponent / total, (xp.log(total) + largest)[:, 0]


def _counts(ids: Any, size: int, device: bool) -> Any:
    """[size] integers: how often each of 0 ... size - 1 is among the ids."""
    if not device:
        return np.bincount(ids[ids >= 0], minlength=size)
    xp = _library(device)  # cupy.bincount would wait for the GPU
    counts = xp.zeros(size + 1, np.int32)
    bins = xp.where((ids >= 0) & (ids < size), ids, size).ravel()
    xp.add.at(counts, bins, xp.ones(bins.shape, np.int32))
    return counts[:size]


def _checked_logits(logits: Any) -> tuple[Any, bool]:
    """[T, E] float64, and whether on a GPU."""
    check_unmasked("logits", logits)
    device = on_device(logits)
    logits = logits if device else np.asarray(logits)
    check_shape(logits)
    if device:
        return cuda.check_array("logits", logits, cuda.DTYPES).astype(np.float64), True
    return host.check_logits(logits), False


def _checked_ids(ids: Any, num_experts: int, device: bool) -> Any:
    if device:
        return cuda.check_array("topk_ids", ids, cuda.ID_DTYPES)
    return host.check_ids("topk_ids", ids, num_experts)


def _check_counts(counts: Any, num_experts: int, device: bool) -> Any:
    counts = check_library("counts", counts, device)
    if counts.shape != (num_experts,) or counts.dtype.kind not in "iuf":
        raise ValueError(
            f"counts must be numbers of shape ({num_experts},) "
            f"(got {counts.dtype} of shape {counts.shape})"
        )
    return counts


def _library(device: bool) -> Any:
    """NumPy or CuPy."""
    if not device:
        return np
    import cupy

    return cupy
