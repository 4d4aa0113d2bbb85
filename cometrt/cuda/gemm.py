"""Expert GEMMs by cuBLAS, one call an expert: bf16 operands, fp32 accumulation.

Group sizes must be known on the host. Row-major throughout; N and T say whether an operand is
taken as it lies or transposed.
"""

from __future__ import annotations

from typing import Any

import numpy as np


class ExpertGemm:
    """c = op(a) op(b), + c where `accumulate`; a, b bf16; c bf16 or float32; all 2-D, C-order."""

    def __init__(self) -> None:
        from cupy.cuda import device
        from cupy_backends.cuda.libs import cublas

        self._cublas, self._handle = cublas, device.get_cublas_handle()
        self._bf16, self._fp32 = 14, 0  # CUDA_R_16BF, CUDA_R_32F
        self._compute_fp32 = 68  # CUBLAS_COMPUTE_32F
        self._scalars = {value: np.array(value, np.float32) for value in (0.0, 1.0)}

    def __call__(self, form: str, a: Any, b: Any, c: Any, *, accumulate: bool = False) -> None:
        """`form`: "NT" c[M,N] = a[M,K] b[N,K]^T; "NN" a[M,K] b[K,N]; "TN" a[K,M]^T b[K,N]."""
        import cupy

        if not c.size:
            return
        inner = a.shape[0] if form[0] == "T" else a.shape[1]
        if not inner:
            if not accumulate:
                c.data.memset_async(0, c.nbytes)
            return
        cublas = self._cublas
        cublas.setStream(self._handle, cupy.cuda.get_current_stream().ptr)
        # cuBLAS is column-major: it computes c^T = op(b)^T op(a)^T.
        rows, columns = c.shape
        trans = {"N": cublas.CUBLAS_OP_N, "T": cublas.CUBLAS_OP_T}
        cublas.gemmEx(
            self._handle,
            trans[form[1]],
            trans[form[0]],
            columns,
            rows,
            inner,
            self._scalars[1.0].ctypes.data,
            b.data.ptr,
            self._bf16,
            b.shape[1],
            a.data.ptr,
            self._bf16,
            a.shape[1],
            self._scalars[1.0 if accumulate else 0.0].ctypes.data,
            c.data.ptr,
            self._bf16 if c.dtype.itemsize == 2 else self._fp32,
            columns,
            self._compute_fp32,
            -1,  # CUBLAS_GEMM_DEFAULT
        )
