"""`CudaLayer`: calls on XLA's stream, by the addresses of XLA's buffers."""

from __future__ import annotations

import contextlib
import ctypes
import math
from collections.abc import Iterator, Sequence
from typing import Any

from cometrt.buffers import Buffers
from cometrt.call_scope import STOPPED
from cometrt.cuda.arrays import capsule_pointer
from cometrt.cuda.exchange_params import Call
from cometrt.cuda.executor import CudaExecutor
from cometrt.interop.jax.calls import BufferLayer
from cometrt.specs import MoESpec
from cometrt.world import World

_NAN_BYTE = 0xFF  # bfloat16 and float32 of such bytes are NaN


class _Tensor(ctypes.Structure):
    """The beginning of DLPack's DLManagedTensor."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", ctypes.c_int32 * 2),
        ("ndim", ctypes.c_int32),
        ("dtype", ctypes.c_uint8 * 4),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
    )


def address_of(buffer: Any) -> int:
    """Of a buffer of XLA. Its `__cuda_array_interface__` raises for bfloat16, which takes longer
    than all else here; a step has dozens of buffers."""
    capsule = buffer.__dlpack__()
    tensor = _Tensor.from_address(capsule_pointer(capsule, b"dltensor"))
    return (tensor.data or 0) + tensor.byte_offset


class _Stream:
    """A raw stream with CUDA's stream protocol."""

    def __init__(self, pointer: int) -> None:
        self._pointer = pointer

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._pointer


class CudaLayer(BufferLayer):
    """On a GPU. A call allocates nothing and waits for nothing: scratch arrays are results of the
    call that nobody reads, so XLA uses their memory again right after it."""

    executor: CudaExecutor

    def __init__(self, world: World, spec: MoESpec, mode: str | None) -> None:
        import cupy

        super().__init__(world, spec, mode)
        if self.config.gemm != "engine":
            raise ValueError(
                f"config must have gemm='engine' for JAX, where a call waits for nothing "
                f"(got {self.config.gemm!r})"
            )
        self._cp, self._gpu = cupy, cupy.cuda.Device()
        # The executor's names of `kept`, and of all buffers of a call in their order.
        x_name = "x_rows" if spec.save == "rows" else "saved_x"
        self._kept_names = [x_name if name == "x" else name for name in self.kept]
        arguments = ["x", "ids", "weights", "w_up", "w_down", "out"]
        self._forward_names = {
            False: [*arguments, *self.forward_scratch(False)],
            True: [*arguments, *self._kept_names, *self.forward_scratch(True)],
        }
        results = ["out", "out_dweight", "dw_up", "dw_down"]
        weights = ["w_up", "w_down"]
        self._backward_names = [
            *("dy", *self._kept_names, *weights, *results, *self.backward_scratch())
        ]

    def forward_scratch(self, training: bool) -> Buffers:
        kept = self._kept_names if training else []
        made = self.executor.forward_buffers[training]
        return {name: of for name, of in made.items() if name not in kept}

    def backward_scratch(self) -> Buffers:
        return self.executor.backward_buffers

    def on_gpu(self) -> contextlib.AbstractContextManager[Any]:
        return self._gpu

    def forward_into(
        self,
        context: Any,
        arguments: Sequence[Any],
        y: Any,
        kept: Sequence[Any],
        scratch: Sequence[Any],
    ) -> None:
        x, ids, *_ = arguments
        wide = ids.dtype.itemsize == 8
        with self._on(context):
            at = self._addresses(self._forward_names[bool(kept)], [*arguments, y, *kept, *scratch])
            self._enqueue(Call("forward", x.shape[0], at, ids_are_64=wide))

    def backward_into(
        self,
        context: Any,
        dy: Any,
        kept: Sequence[Any],
        weights: Sequence[Any],
        results: Sequence[Any],
        scratch: Sequence[Any],
    ) -> None:
        buffers = [dy, *kept, *weights, *results, *scratch]
        with self._on(context):
            at = self._addresses(self._backward_names, buffers)
            self._enqueue(Call("backward", dy.shape[0], at))

    def _enqueue(self, call: Call) -> None:
        # What the device has found is not raised here: ranks would find it at different calls. The
        # device itself lets later calls do nothing until all hosts have raised it.
        with self.calling():
            self.executor.check_running(STOPPED)
            with self.executor.guard(call.operation):
                self.executor.enqueue(call)

    @contextlib.contextmanager
    def _on(self, context: Any) -> Iterator[Any]:
        """On XLA's stream. XLA calls from threads of its own, whose current GPU is any."""
        with self._gpu, self._cp.cuda.Stream.from_external(_Stream(context.stream)) as stream:
            yield stream

    def fail(self, context: Any, results: Sequence[Any], kept: Sequence[Any]) -> None:
        # `kept` begins with the epoch; 0 there is a failed forward, whose backward does nothing.
        filled = [(result, _NAN_BYTE) for result in results] + [(epoch, 0) for epoch in kept[:1]]
        with self._on(context) as stream:
            for buffer, byte in filled:
                nbytes = math.prod(buffer.shape) * buffer.dtype.itemsize
                if nbytes:
                    self._cp.cuda.runtime.memsetAsync(address_of(buffer), byte, nbytes, stream.ptr)

    def _addresses(self, names: Sequence[str], buffers: Sequence[Any]) -> dict[str, int]:
        pairs = zip(names, buffers, strict=True)
        return {name: address_of(buffer) for name, buffer in pairs}
