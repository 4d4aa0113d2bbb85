"""Triton kernels of benchmarks/rivals_torch.py: gathers and sums of rows, SwiGLU, its gradient."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl


@triton.jit
def _gather_rows(out, source, index, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.load(index + row).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    value = tl.load(source + at * columns + column, mask=inside & (at >= 0), other=0.0)
    tl.store(out + row * columns + column, value, mask=inside)


@triton.jit
def _sum_rows(
    out,
    source,
    index,
    weights,
    columns,
    J: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside, total = column < columns, tl.zeros((BLOCK,), tl.float32)
    for j in tl.static_range(J):
        at = tl.load(index + row * J + j).to(tl.int64)
        value = tl.load(source + at * columns + column, mask=inside & (at >= 0), other=0.0)
        value = value.to(tl.float32)
        if WEIGHTED:
            value = value * tl.load(weights + row * J + j)
        total += value
    tl.store(out + row * columns + column, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu(a, z, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(z + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(z + row * 2 * width + width + column, mask=inside, other=0.0).to(tl.float32)
    value = gate * tl.sigmoid(gate) * up
    tl.store(a + row * width + column, value.to(a.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_backward(dz, weighted_a, dweight, z, da, weights, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    weight, total = tl.load(weights + row), tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, width, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        inside = column < width
        gate_at, up_at = row * 2 * width + column, row * 2 * width + width + column
        gate = tl.load(z + gate_at, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(z + up_at, mask=inside, other=0.0).to(tl.float32)
        d = tl.load(da + row * width + column, mask=inside, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        a = gate * sigmoid * up
        total += d * a
        d = d * weight
        dgate, dup = d * up * sigmoid * (1 + gate * (1 - sigmoid)), d * gate * sigmoid
        tl.store(dz + gate_at, dgate.to(dz.dtype.element_ty), mask=inside)
        tl.store(dz + up_at, dup.to(dz.dtype.element_ty), mask=inside)
        weighted = (a * weight).to(weighted_a.dtype.element_ty)
        tl.store(weighted_a + row * width + column, weighted, mask=inside)
    tl.store(dweight + row, tl.sum(total, 0))


def gather_rows(out: Any, source: Any, index: Any) -> Any:
    """out[i] = source[index[i]], or 0 where the index is -1."""
    rows, columns = out.shape
    if rows:
        block = _block(columns, 2048)
        grid = (rows, triton.cdiv(columns, block))
        _gather_rows[grid](out, source, index, columns, BLOCK=block, num_warps=4)
    return out


def sum_rows(out: Any, source: Any, index: Any, weights: Any = None) -> Any:
    """out[i] = the sum over j of weights[i, j] * source[index[i, j]]; index -1 counts nothing."""
    rows, columns = out.shape
    if rows:
        block, weighted = _block(columns, 2048), weights is not None
        _sum_rows[(rows, triton.cdiv(columns, block))](
            out, source, index, weights if weighted else index, columns,
            J=index.shape[1], WEIGHTED=weighted, BLOCK=block, num_warps=4,
        )  # fmt: skip
    return out


def swiglu(z: Any) -> Any:
    """[rows, I] of z [rows, 2 I], the gate columns first."""
    rows, width = z.shape[0], z.shape[1] // 2
    a, block = torch.empty((rows, width), dtype=z.dtype, device=z.device), _block(width, 1024)
    _swiglu[(rows, triton.cdiv(width, block))](a, z, width, BLOCK=block, num_warps=4)
    return a


def swiglu_backward(z: Any, da: Any, weights: Any) -> tuple[Any, Any, Any]:
    """dz, a times the row's weight, and the gradient of that weight."""
    rows, width = da.shape
    dz, weighted_a = torch.empty_like(z), torch.empty_like(da)
    dweight = torch.empty(rows, dtype=torch.float32, device=z.device)
    _swiglu_backward[(rows,)](
        dz, weighted_a, dweight, z, da, weights, width, BLOCK=_block(width, 1024), num_warps=4
    )
    return dz, weighted_a, dweight


def _block(columns: int, most: int) -> int:
    return min(most, 1 << (columns - 1).bit_length())
