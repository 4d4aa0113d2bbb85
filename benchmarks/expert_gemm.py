"""One cuBLAS GEMM on CuPy arrays, as `gemm="cublas"` makes them."""

from __future__ import annotations

from typing import Any

import cupy as cp

from cometrt.cuda.cublas import CublasGemm, Matrix


class ExpertGemm:
    """As `cometrt.cuda.cublas.CublasGemm`, on the current stream."""

    def __init__(self) -> None:
        self._gemm = CublasGemm()

    def __call__(self, form: str, a: Any, b: Any, c: Any, *, accumulate: bool = False) -> None:
        """a, b: [rows, columns] bf16; c: bf16 or float32."""
        stream = int(cp.cuda.get_current_stream().ptr)
        self._gemm(stream, form, _matrix(a), _matrix(b), _matrix(c), accumulate=accumulate)


def _matrix(array: Any) -> Matrix:
    return Matrix(int(array.data.ptr), *array.shape, float32=array.dtype.itemsize == 4)
