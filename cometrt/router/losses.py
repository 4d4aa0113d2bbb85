"""Losses of routers, their backward, loss-free balancing, and statistics of the experts' load.

All take NumPy or CuPy arrays and compute in float64. With NumPy a wrong value is a ValueError and
scalars are floats. With CuPy nothing waits for the GPU: scalars are zero-dimensional arrays, wrong
logits give NaN, and ids outside [0, E) count as dropped. So a call can be captured in a CUDA graph,
after a first call in which CuPy compiles its kernels.

A token whose K ids are all -1 is padding: no loss counts it.
"""

from __future__ import annotations

import dataclasses
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
            `load_statistics` counts them, summed over ranks and micro-batches. They give f_e; p_e
            is of this rank's tokens. None: the counts of topk_ids. Not with per_sequence.

    Raises:
        ValueError: for wrong shapes or dtypes, with NumPy also for values out of range.
    """
    terms = _balance(logits, topk_ids, per_sequence, counts)
    loss = (terms.fractions * terms.probabilities * terms.factors[:, None]).sum()
    return loss if terms.batch.device else float(loss)


def balance_loss_backward(
    dloss: Any,
    logits: Any,
    topk_ids: Any,
    *,
    per_sequence: int | None = None,
    counts: Any = None,
) -> Any:
    """Gradient of the logits, dlogits [T, E] float32, for `balance_loss`.

    The fractions f_e are piecewise constant and have no gradient.

    Args:
        dloss: a number or a zero-dimensional CuPy array: the loss's coefficient in the total loss.
        logits, topk_ids, per_sequence, counts: the arguments of `balance_loss`.

    Raises:
        ValueError: as `balance_loss`.
    """
    terms = _balance(logits, topk_ids, per_sequence, counts)
    batch = terms.batch
    balance = (terms.fractions, terms.factors * dloss)
    return batch.module.loss_backward(batch.logits, batch.ids, batch.length, balance, None)


def z_loss(logits: Any, topk_ids: Any = None) -> Any:
    """The mean over tokens of logsumexp(logits)^2 (ST-MoE, arXiv 2202.08906). 0 for no tokens.

    Args:
        logits: [T, E]; finite, or -inf where an expert is masked.
        topk_ids: [T, K], to leave out padding. None: every token counts.

    Raises:
        ValueError: for wrong shapes or dtypes, with NumPy also for values out of range.
    """
    batch = _batch(logits, topk_ids)
    sums = batch.sums()
    loss = sums[:, -2].sum() / batch.xp.maximum(sums[:, -1].sum(), 1.0)
    return loss if batch.device else float(loss)


def z_loss_backward(dloss: Any, logits: Any, topk_ids: Any = None) -> Any:
    """Gradient of the logits, dlogits [T, E] float32, for `z_loss`.

    Args:
        dloss: a number or a zero-dimensional CuPy array: the loss's coefficient in the total loss.
        logits, topk_ids: the arguments of `z_loss`.

    Raises:
        ValueError: as `z_loss`.
    """
    batch = _batch(logits, topk_ids)
    factor = 2.0 * dloss / batch.xp.maximum(batch.sums()[:, -1].sum(keepdims=True), 1.0)
    return batch.module.loss_backward(batch.logits, batch.ids, batch.length, None, factor)


def update_bias(bias: Any, counts: Any, *, rate: float = 1e-3) -> None:
    """Loss-free balancing: add rate * sign(mean(counts) - counts) to `bias`, in place.

    The bias of a `..._topk` call then rises for experts with few pairs (DeepSeek-V3, 0.001).

    Args:
        bias: [E], floating, the same on all ranks.
        counts: [E], pairs of each expert since the last update, summed over all ranks. Then the
            bias stays the same on all ranks.
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
    if device:
        cuda.check_array("bias", bias, cuda.DTYPES)
    counts = _check_counts(counts, len(bias), device)
    rate = check_positive("rate", rate)
    xp = _library(device)
    step = rate * xp.sign(counts.mean() - counts)
    bias[...] = (bias.astype(np.float64) + step).astype(bias.dtype)


# ---- what losses have in common ------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class _Batch:
    """Checked arguments of a loss: B sequences of `length` tokens, on the GPU or on the host."""

    logits: Any
    ids: Any
    length: int
    device: bool

    @property
    def xp(self) -> Any:
        return _library(self.device)

    @property
    def module(self) -> Any:
        return cuda if self.device else host

    def sums(self) -> Any:
        """[B, 2 E + 3]: see `host.loss_sums`."""
        return self.module.loss_sums(self.logits, self.ids, self.length)


class _Balance(NamedTuple):
    """Terms of the balance loss, sum(fractions * probabilities * factors).

    Attributes:
        fractions: [B, E], or [1, E] with counts of the global batch.
        probabilities: [B, E], sums over a sequence's tokens.
        factors: [B], E / (tokens of the sequence * number of sequences), without padding.
    """

    batch: _Batch
    fractions: Any
    probabilities: Any
    factors: Any


def _balance(logits: Any, topk_ids: Any, per_sequence: int | None, counts: Any) -> _Balance:
    if per_sequence is not None and counts is not None:
        raise ValueError("counts must be None with per_sequence (got both)")
    if topk_ids is None:
        raise ValueError("topk_ids must be an array (got None)")
    batch = _batch(logits, topk_ids, per_sequence)
    num_experts = batch.logits.shape[1]
    sums = batch.sums()
    if counts is None:
        pairs = sums[:, num_experts : 2 * num_experts]
    else:
        pairs = _check_counts(counts, num_experts, batch.device).astype(np.float64)[None]
    xp, tokens = batch.xp, sums[:, -3]
    num_sequences = xp.maximum((tokens > 0).sum(), 1)
    return _Balance(
        batch=batch,
        fractions=pairs / xp.maximum(pairs.sum(axis=1, keepdims=True), 1.0),
        probabilities=sums[:, :num_experts],
        factors=num_experts / (xp.maximum(tokens, 1.0) * num_sequences),
    )


def _batch(logits: Any, topk_ids: Any, per_sequence: int | None = None) -> _Batch:
    """Check the arguments of a loss, but not the values in them."""
    check_unmasked("logits", logits)
    device = on_device(logits)
    logits = logits if device else np.asarray(logits)
    num_tokens, _ = check_shape(logits)
    ids = topk_ids
    if ids is not None:
        ids = check_library("topk_ids", ids, device)
        check_ids_form("topk_ids", ids, num_tokens)
    length = max(num_tokens, 1)
    if per_sequence is not None:
        length = check_int("per_sequence", per_sequence, minimum=1)
        if num_tokens % length:
            raise ValueError(f"per_sequence must divide the {num_tokens} tokens (got {length})")
    return _Batch(logits, ids, length, device)


def _counts(ids: Any, size: int, device: bool) -> Any:
    """[size] integers: how often each of 0 ... size - 1 is among the ids; others are ignored."""
    if not device:
        return np.bincount(ids[ids >= 0], minlength=size)
    xp = _library(device)  # cupy.bincount would wait for the GPU
    counts = xp.zeros(size + 1, np.int32)
    bins = xp.where((ids >= 0) & (ids < size), ids, size).ravel()
    xp.add.at(counts, bins, xp.ones(bins.shape, np.int32))
    return counts[:size]


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
