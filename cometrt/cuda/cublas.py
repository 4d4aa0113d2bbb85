"""Both passes with one cuBLAS GEMM an expert: bf16 operands, fp32 accumulation.

cuBLAS takes group sizes from the host: so a call waits once for its plan, and cannot be captured.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np

from cometrt.cuda.exchange_params import Call, ExchangeParamsBuilder
from cometrt.cuda.report import pinned
from cometrt.cuda.types import Launches
from cometrt.kernels.launch import load_kernels
from cometrt.kernels.params import (
    ParamStruct,
    activation_params_dtype,
    exchange_state_dtype,
    geometry_params,
)
from cometrt.plan import PlanShape
from cometrt.world.partitions import num_sms

_BF16, _FLOAT32, _COMPUTE_FLOAT32 = 14, 0, 68  # CUDA_R_16BF, CUDA_R_32F, CUBLAS_COMPUTE_32F
_DEFAULT_ALGORITHM = -1


class Matrix:
    """A row-major matrix at an address."""

    def __init__(self, address: int, rows: int, columns: int, *, float32: bool = False) -> None:
        self.address, self.rows, self.columns, self.float32 = address, rows, columns, float32

    def part(self, begin: int, end: int) -> Matrix:
        """Rows [begin, end)."""
        offset = begin * self.columns * (4 if self.float32 else 2)
        return Matrix(self.address + offset, end - begin, self.columns, float32=self.float32)

    def split(self, count: int) -> list[Matrix]:
        """`count` equal matrices, one below the other."""
        rows = self.rows // count
        return [self.part(rows * index, rows * (index + 1)) for index in range(count)]


class CublasGemm:
    """c = op(a) op(b), + c where `accumulate`; a and b are bf16."""

    def __init__(self) -> None:
        from cupy.cuda import device, runtime
        from cupy_backends.cuda.libs import cublas

        self._cublas, self._runtime = cublas, runtime
        self._handle = device.get_cublas_handle()
        self._scalars = {value: np.array(value, np.float32) for value in (0.0, 1.0)}

    def __call__(
        self,
        stream: int,
        form: str,
        a: Matrix,
        b: Matrix,
        c: Matrix,
        *,
        accumulate: bool = False,
    ) -> None:
        """`form`: "NT" c[M,N] = a[M,K] b[N,K]^T; "NN" a[M,K] b[K,N]; "TN" a[K,M]^T b[K,N]."""
        inner = a.rows if form[0] == "T" else a.columns
        if not c.rows * c.columns:
            return
        if not inner:
            if not accumulate:
                nbytes = c.rows * c.columns * (4 if c.float32 else 2)
                self._runtime.memsetAsync(c.address, 0, nbytes, stream)
            return
        cublas = self._cublas  # which CuPy runs on its current stream
        # cuBLAS is column-major: it computes c^T = op(b)^T op(a)^T.
        trans = {"N": cublas.CUBLAS_OP_N, "T": cublas.CUBLAS_OP_T}
        cublas.gemmEx(
            self._handle,
            trans[form[1]],
            trans[form[0]],
            c.columns,
            c.rows,
            inner,
            self._scalars[1.0].ctypes.data,
            b.address,
            _BF16,
            b.columns,
            a.address,
            _BF16,
            a.columns,
            self._scalars[1.0 if accumulate else 0.0].ctypes.data,
            c.address,
            _FLOAT32 if c.float32 else _BF16,
            c.columns,
            _COMPUTE_FLOAT32,
            _DEFAULT_ALGORITHM,
        )


class CublasExperts:
    """GEMMs and activations of one layer's experts, and what the host has to know for them.

    Args:
        state: address of the layer's ExchangeState.
        table_offsets: byte offset of each of a plan's tables, by name.
        meet: threads of one process call it between what may wait for the whole device (cuBLAS
            loads its kernels when it first needs them) and a kernel that waits for a peer.
        kernels: gets "up", "down", "down_dgrad", "up_dgrad" and "wgrad".
    """

    def __init__(
        self,
        shape: PlanShape,
        state: int,
        table_offsets: dict[str, int],
        meet: Callable[[], None],
        kernels: Launches,
    ) -> None:
        from cupy.cuda import runtime

        self._shape, self._geometry, self._gemm = shape, shape.geometry, CublasGemm()
        self._runtime, self._state, self._table_offsets = runtime, state, table_offsets
        self.meet = meet
        self._status = pinned(exchange_state_dtype)
        self._offsets = pinned(np.dtype(np.int32), shape.geometry.local_experts + 1)
        self._activate, self._activate_backward = load_kernels(
            "sequential/activation.cu", "activate", "activate_backward"
        )
        kernels |= {
            "up": self._up,
            "down": self._down,
            "down_dgrad": self._down_dgrad,
            "up_dgrad": self._up_dgrad,
            "wgrad": self._wgrad,
        }
        self._warm_up()

    def rows(self, stream: int, call: Call) -> list[tuple[int, int]]:
        """Waits for the plan: rows [begin, end) of each expert; empty where the call has failed."""
        offsets = call.at["tables"] + self._table_offsets["expert_offsets"]
        runtime = self._runtime
        for target, source in ((self._status, self._state), (self._offsets, offsets)):
            runtime.memcpyAsync(
                target.ctypes.data, source, target.nbytes, runtime.memcpyDeviceToHost, stream
            )
        runtime.streamSynchronize(stream)
        if not self._status["ok"][0]:
            return []
        return [(int(a), int(b)) for a, b in itertools.pairwise(self._offsets)]

    def _rows_of(self, call: Call) -> dict[str, Matrix]:
        """All [capacity, columns] arrays of the call."""
        geometry, at = self._geometry, call.at
        hidden, width, up = (
            geometry.spec.hidden,
            geometry.local_intermediate,
            geometry.up_columns,
        )
        columns = {
            **dict.fromkeys(("x_rows", "o", "dy_rows", "dx_rows"), hidden),
            **dict.fromkeys(("z", "dz"), up),
            **dict.fromkeys(("a", "weighted_a", "da"), width),
        }
        return {
            name: Matrix(at[name], self._shape.capacity, width, float32=name == "da")
            for name, width in columns.items()
            if name in at
        }

    def _weights(self, call: Call, prefix: str) -> tuple[list[Matrix], list[Matrix]]:
        """w_up and w_down of each expert, or their gradients with the prefix "dw"."""
        geometry, experts = self._geometry, self._geometry.local_experts
        names = f"{prefix}_up", f"{prefix}_down"
        shapes = (
            (experts * geometry.up_columns, geometry.spec.hidden),
            (experts * geometry.spec.hidden, geometry.local_intermediate),
        )
        wide = call.float32_gradients if prefix == "dw" else (False, False)
        up, down = (
            Matrix(call.at[name], *size, float32=float32).split(experts)
            for name, size, float32 in zip(names, shapes, wide, strict=True)
        )
        return up, down

    def _up(self, stream: int, call: Call, rows: list[tuple[int, int]]) -> None:
        """z from x_rows; in a forward, a too."""
        of, (w_up, _) = self._rows_of(call), self._weights(call, "w")
        for (begin, end), weights in zip(rows, w_up, strict=True):
            x, z = of["x_rows"].part(begin, end), of["z"].part(begin, end)
            self._gemm(stream, "NT", x, weights, z)
        if call.operation != "backward":
            self._activate(stream, 8 * num_sms(), self._activation_params(call, "z", "a"))

    def _down(self, stream: int, call: Call, rows: list[tuple[int, int]]) -> None:
        """o from a."""
        of, (_, w_down) = self._rows_of(call), self._weights(call, "w")
        for (begin, end), weights in zip(rows, w_down, strict=True):
            a, o = of["a"].part(begin, end), of["o"].part(begin, end)
            self._gemm(stream, "NT", a, weights, o)

    def _down_dgrad(self, stream: int, call: Call, rows: list[tuple[int, int]]) -> None:
        """dz, weighted_a and dweight from dy and z."""
        of, (_, w_down) = self._rows_of(call), self._weights(call, "w")
        for (begin, end), weights in zip(rows, w_down, strict=True):
            dy, da = of["dy_rows"].part(begin, end), of["da"].part(begin, end)
            self._gemm(stream, "NN", dy, weights, da)
        params = self._activation_params(call, "z", "weighted_a", "da", "dz", "dweight_rows")
        self._activate_backward(stream, 8 * num_sms(), params)

    def _up_dgrad(self, stream: int, call: Call, rows: list[tuple[int, int]]) -> None:
        """Rows of dx from dz."""
        of, (w_up, _) = self._rows_of(call), self._weights(call, "w")
        for (begin, end), weights in zip(rows, w_up, strict=True):
            dz, dx = of["dz"].part(begin, end), of["dx_rows"].part(begin, end)
            self._gemm(stream, "NN", dz, weights, dx)

    def _wgrad(self, stream: int, call: Call, rows: list[tuple[int, int]]) -> None:
        """The gradients of both weights."""
        of, gradients = self._rows_of(call), self._weights(call, "dw")
        for (begin, end), dw_up, dw_down in zip(rows, *gradients, strict=True):
            for left, right, out in (("dz", "x_rows", dw_up), ("dy_rows", "weighted_a", dw_down)):
                a, b = of[left].part(begin, end), of[right].part(begin, end)
                self._gemm(stream, "TN", a, b, out, accumulate=call.accumulate)

    def _activation_params(self, call: Call, *arrays: str) -> ParamStruct:
        params = ParamStruct(activation_params_dtype)
        params.fields["g"] = geometry_params(self._shape)
        for name in ("expert_offsets", "row_weight"):
            params.fields[name] = call.at["tables"] + self._table_offsets[name]
        for name in arrays:
            params.fields["a" if name == "weighted_a" else name] = call.at[name]
        return params

    def _warm_up(self) -> None:
        """Every kind of GEMM once. cuBLAS loads a kernel when it first needs it, and may wait for
        the whole device then: no peer's kernel may wait for this rank meanwhile."""
        import cupy as cp

        geometry, stream = self._geometry, int(cp.cuda.get_current_stream().ptr)
        hidden, up, width = geometry.spec.hidden, geometry.up_columns, geometry.local_intermediate
        rows = min(self._shape.capacity, 4 * self._shape.config.block_m)
        shapes = {
            "x": (rows, hidden), "z": (rows, up), "a": (rows, width),
            "w_up": (up, hidden), "w_down": (hidden, width),
        }  # fmt: skip
        memory = {name: cp.zeros(shape, cp.uint16) for name, shape in shapes.items()}
        wide = {name: cp.zeros(shapes[name], cp.float32) for name in ("a", "w_up", "w_down")}
        of = {name: Matrix(memory[name].data.ptr, *shape) for name, shape in shapes.items()}
        of32 = {
            name: Matrix(array.data.ptr, *shapes[name], float32=True)
            for name, array in wide.items()
        }
        self._gemm(stream, "NT", of["x"], of["w_up"], of["z"])
        self._gemm(stream, "NT", of["a"], of["w_down"], of["x"])
        self._gemm(stream, "NN", of["x"], of["w_down"], of32["a"])
        self._gemm(stream, "NN", of["z"], of["w_up"], of["x"])
        for gradients in (of, of32):
            for accumulate in (False, True):
                for a, b, out in (("z", "x", "w_up"), ("x", "a", "w_down")):
                    self._gemm(stream, "TN", of[a], of[b], gradients[out], accumulate=accumulate)
        cp.cuda.get_current_stream().synchronize()  # then the memory may go


class CublasForward:
    """The sequential forward, GEMMs by cuBLAS."""

    def __init__(self, experts: CublasExperts) -> None:
        self._experts = experts

    def launch(self, kernels: Launches, stream: int, params: ParamStruct, call: Call) -> None:
        experts = self._experts
        rows = experts.rows(stream, call)
        if rows:
            kernels["dispatch"](stream, params)
            kernels["up"](stream, call, rows)
            kernels["down"](stream, call, rows)
            kernels["push"](stream, params)
            experts.meet()
            kernels["home_reduce"](stream, params)


class CublasBackward:
    """The sequential backward. Weight gradients are computed while rows of dx cross.

    Args:
        recomputes: whether the up GEMM computes z again, with save="nothing".
    """

    def __init__(
        self, experts: CublasExperts, builder: ExchangeParamsBuilder, recomputes: bool
    ) -> None:
        self._experts, self._builder, self._recomputes = experts, builder, recomputes

    def launch(self, kernels: Launches, stream: int, params: ParamStruct, call: Call) -> None:
        experts = self._experts
        rows = experts.rows(stream, call)
        if not rows:
            return
        kernels["dispatch"](stream, params)
        if "saved_x" in call.at:  # x again: before the first partial row of dx leaves
            self._builder.pull_x(params, call)
            kernels["dispatch"](stream, params)
        if self._recomputes:
            kernels["up"](stream, call, rows)
        kernels["down_dgrad"](stream, call, rows)
        kernels["up_dgrad"](stream, call, rows)
        kernels["push"](stream, params)
        kernels["wgrad"](stream, call, rows)
        experts.meet()
        kernels["home_reduce"](stream, params)
