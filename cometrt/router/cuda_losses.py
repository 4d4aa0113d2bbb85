"""Losses and statistics over CuPy arrays: the functions of `host_losses`, without a wait.

Scalars are arrays of no dimension. Wrong logits give NaN, and ids outside [0, E) count as dropped.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cometrt.router.cuda import (
    DTYPES,
    ID_DTYPES,
    MAX_EXPERTS,
    NUMBER_DTYPES,
    address,
    check_array,
    check_size,
    kernels_for,
    router_fields,
    structs,
)
from cometrt.router.options import Batch

MIN_CHUNK_TOKENS = 16  # whose losses a block adds up: more where there are more than MAX_CHUNKS
MAX_CHUNKS = 1024


def balance_loss(batch: Batch) -> Any:
    return _loss(batch, balance=True)


def balance_loss_backward(dloss: Any, batch: Batch) -> Any:
    return _loss_backward(dloss, batch, balance=True)


def z_loss(batch: Batch) -> Any:
    return _loss(batch, balance=False)


def z_loss_backward(dloss: Any, batch: Batch) -> Any:
    return _loss_backward(dloss, batch, balance=False)


def load_statistics(ids: Any, num_experts: int) -> tuple[Any, ...]:
    """Fields of `LoadStatistics`, by one block."""
    import cupy

    device_id = cupy.cuda.runtime.getDevice()
    check_size("num_experts", num_experts, MAX_EXPERTS)
    ids = check_array("topk_ids", ids, ID_DTYPES, device_id)
    counts, statistics = cupy.empty(num_experts + 1, np.int32), cupy.empty(3, np.float64)
    params = structs.load
    params.fields[0] = (
        ids.data.ptr,
        counts.data.ptr,
        statistics.data.ptr,
        ids.size,
        num_experts,
        ids.dtype.itemsize == 8,
    )
    kernel = kernels_for(device_id, num_experts)["router_load"]
    kernel(cupy.cuda.get_current_stream().ptr, 1, params)
    return (
        counts[:num_experts],
        statistics[0],
        statistics[1],
        counts[num_experts],
        statistics[2],
    )


def update_bias(bias: Any, counts: Any, rate: float) -> None:
    import cupy

    device_id = cupy.cuda.runtime.getDevice()
    num_experts = len(bias)
    check_size("bias' number of experts", num_experts, MAX_EXPERTS)
    check_array("bias", bias[:1], DTYPES, device_id)  # bias itself may be strided
    counts = _numbers("counts", counts, device_id)
    params = structs.bias
    params.fields[0] = (
        bias.data.ptr,
        counts.data.ptr,
        rate,
        num_experts,
        bias.strides[0] // bias.dtype.itemsize,
        DTYPES.index(bias.dtype),
        NUMBER_DTYPES.index(counts.dtype),
    )
    kernel = kernels_for(device_id, num_experts)["router_update_bias"]
    kernel(cupy.cuda.get_current_stream().ptr, 1, params)


def _loss(batch: Batch, *, balance: bool) -> Any:
    """The loss, float64 of no dimension: by one kernel that adds up chunks of tokens, and one that
    adds up chunks."""
    import cupy

    device_id, batch = _checked(batch)
    if not len(batch.logits):
        return cupy.zeros((), np.float64)
    loss = cupy.empty((), np.float64)
    _launch_sums(device_id, batch, balance, loss, None, 0.0, None)
    return loss


def _loss_backward(dloss: Any, batch: Batch, *, balance: bool) -> Any:
    """dlogits [T, E] float32: by the two kernels of the loss, and one for the gradient."""
    import cupy

    device_id, batch = _checked(batch)
    dlogits = cupy.empty(batch.logits.shape, np.float32)
    value = 0.0
    if isinstance(dloss, cupy.ndarray):
        if dloss.size != 1:
            raise ValueError(f"dloss must be one number (got an array of shape {dloss.shape})")
        dloss = _numbers("dloss", dloss, device_id)
    else:
        value, dloss = float(dloss), None
    if not len(batch.logits):
        return dlogits
    loss = cupy.empty((), np.float64)
    _launch_sums(device_id, batch, balance, loss, dloss, value, dlogits)
    return dlogits


def _launch_sums(
    device_id: int,
    batch: Batch,
    balance: bool,
    loss: Any,
    dloss: Any,
    dloss_value: float,
    dlogits: Any,
) -> None:
    """Queue the kernels of a loss, and that of its backward unless dlogits is None."""
    import cupy

    logits, ids, length, counts, _ = batch
    num_tokens, num_experts = logits.shape
    num_sequences = num_tokens // length
    chunk_tokens = max(MIN_CHUNK_TOKENS, -(-num_tokens // MAX_CHUNKS))
    chunks = -(-length // chunk_tokens)
    columns = num_experts if balance else 0
    num_totals = num_sequences * max(1, -(-columns // 32))
    sizes = (  # of the arrays that kernels pass each other, in 8 bytes
        num_sequences * chunks * (2 * columns + 2),  # chunk_sums
        num_sequences * columns,  # pairs
        num_sequences,  # factors
        2 * num_totals,  # terms
        1,  # denominator
        1,  # num_done
    )
    scratch = cupy.empty(sum(sizes), np.float64)
    addresses, at = [], scratch.data.ptr
    for size in sizes:
        addresses.append(at)
        at += 8 * size
    router, more = structs.router, structs.loss
    router.fields[0] = router_fields(
        logits=logits, topk=0 if ids is None else ids.shape[1], ids=ids, dlogits=dlogits
    )
    more.fields[0] = (
        address(counts),
        address(dloss),
        dloss_value,
        loss.data.ptr,
        *addresses,
        length,
        chunks,
        chunk_tokens,
        balance,
        0 if counts is None else NUMBER_DTYPES.index(counts.dtype),
        0 if dloss is None else NUMBER_DTYPES.index(dloss.dtype),
    )
    kernels, stream = kernels_for(device_id, num_experts), cupy.cuda.get_current_stream().ptr
    kernels["router_loss_sums"](stream, num_sequences * chunks, router, more)
    kernels["router_loss_totals"](stream, num_totals, router, more)
    if dlogits is not None:
        kernel = kernels["router_loss_backward"]
        kernel(stream, -(-num_tokens // (kernel.block // 32)), router, more)


def _checked(batch: Batch) -> tuple[int, Batch]:
    """The current GPU, and the batch as the kernels read it."""
    import cupy

    device_id = cupy.cuda.runtime.getDevice()
    check_size("logits' number of experts", batch.logits.shape[1], MAX_EXPERTS)
    logits = check_array("logits", batch.logits, DTYPES, device_id)
    ids, counts = batch.ids, batch.counts
    if ids is not None:
        ids = check_array("topk_ids", ids, ID_DTYPES, device_id)
    if counts is not None:
        counts = _numbers("counts", counts, device_id)
    return device_id, Batch(logits, ids, batch.length, counts, batch.device)


def _numbers(name: str, array: Any, device_id: int) -> Any:
    """An array of numbers whose dtype the kernels read; of another one a copy in float64."""
    if array.dtype not in NUMBER_DTYPES and array.dtype.kind in "iuf":
        array = array.astype(np.float64)
    return check_array(name, array, NUMBER_DTYPES, device_id)
