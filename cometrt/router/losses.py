"""Losses of routers, their backward, loss-free balancing, and statistics of the experts' load.

All take NumPy or CuPy arrays and compute in float64. With NumPy a wrong value is a ValueError and
scalars are floats. With CuPy nothing waits for the GPU: scalars are arrays of no dimension, wrong
logits give NaN, and ids outside [0, E) count as dropped. So a call can be captured in a CUDA graph,
after a first one that loads its kernels. A loss is two kernels, its backward three, and statistics
and the bias update are one each.

A token whose K ids are all -1 is padding: no loss counts it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from cometrt.router import cuda, cuda_losses, host_losses
from cometrt.router.options import (
    Batch,
    check_ids_form,
    check_library,
    check_shape,
    on_device,
)
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
    """Count the pairs of each expert. Without a pair all but `idle` and `dropped` are 0.

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
    return LoadStatistics(*_module(device).load_statistics(ids, num_experts))


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
            the sequences that have a kept pair. S must divide T. None: all tokens are one
            sequence. (DeepSeek-V3 balances each sequence too, by normalised sigmoid scores in
            place of softmax.)
        counts: [E], for the balance of the global batch: pairs of each expert, as
            `load_statistics` counts them, summed over ranks and micro-batches. f_e follows them,
            and p_e this rank's tokens. None: the counts of topk_ids. Not with per_sequence.

    Raises:
        ValueError: for wrong shapes or dtypes, with NumPy also for values out of range.
    """
    batch = _balance_batch(logits, topk_ids, per_sequence, counts)
    return _module(batch.device).balance_loss(batch)


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
        dloss: a number, or a CuPy array of one: the loss's coefficient in the total loss.
        logits, topk_ids, per_sequence, counts: the arguments of `balance_loss`.

    Raises:
        ValueError: as `balance_loss`.
    """
    batch = _balance_batch(logits, topk_ids, per_sequence, counts)
    return _module(batch.device).balance_loss_backward(dloss, batch)


def z_loss(logits: Any, topk_ids: Any = None) -> Any:
    """The mean over tokens of logsumexp(logits)^2 (ST-MoE, arXiv 2202.08906). 0 for no tokens.

    Args:
        logits: [T, E]; finite, or -inf where an expert is masked.
        topk_ids: [T, K], to leave out padding. None: every token counts.

    Raises:
        ValueError: for wrong shapes or dtypes, with NumPy also for values out of range.
    """
    batch = _batch(logits, topk_ids)
    return _module(batch.device).z_loss(batch)


def z_loss_backward(dloss: Any, logits: Any, topk_ids: Any = None) -> Any:
    """Gradient of the logits, dlogits [T, E] float32, for `z_loss`.

    Args:
        dloss: a number, or a CuPy array of one: the loss's coefficient in the total loss.
        logits, topk_ids: the arguments of `z_loss`.

    Raises:
        ValueError: as `z_loss`.
    """
    batch = _batch(logits, topk_ids)
    return _module(batch.device).z_loss_backward(dloss, batch)


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
    if bias.ndim != 1 or not len(bias) or bias.dtype not in cuda.DTYPES:
        raise ValueError(
            f"bias must be floating, of shape (E,) (got {bias.dtype} of shape {bias.shape})"
        )
    counts = _check_counts(counts, len(bias), device)
    rate = check_positive("rate", rate)
    _module(device).update_bias(bias, counts, rate)


# ---- what losses have in common ------------------------------------------------------------------


def _module(device: bool) -> Any:
    return cuda_losses if device else host_losses


def _balance_batch(logits: Any, topk_ids: Any, per_sequence: int | None, counts: Any) -> Batch:
    if per_sequence is not None and counts is not None:
        raise ValueError("counts must be None with per_sequence (got both)")
    if topk_ids is None:
        raise ValueError("topk_ids must be an array (got None)")
    batch = _batch(logits, topk_ids, per_sequence)
    if counts is None:
        return batch
    counts = _check_counts(counts, batch.logits.shape[1], batch.device)
    return Batch(batch.logits, batch.ids, batch.length, counts, batch.device)


def _batch(logits: Any, topk_ids: Any, per_sequence: int | None = None) -> Batch:
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
    return Batch(logits, ids, length, None, device)


def _check_counts(counts: Any, num_experts: int, device: bool) -> Any:
    counts = check_library("counts", counts, device)
    if counts.shape != (num_experts,) or counts.dtype.kind not in "iuf":
        raise ValueError(
            f"counts must be numbers of shape ({num_experts},) "
            f"(got {counts.dtype} of shape {counts.shape})"
        )
    return counts
