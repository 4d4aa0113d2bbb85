"""Checks and results for arrays on the device: CuPy's, or any that speaks DLPack."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np

from cometrt.arrays import check_form


class CudaArrays:
    """`cometrt.arrays.HostArrays` for device="cuda"."""

    def __init__(self) -> None:
        import cupy

        self._cp = cupy
        self._device_id = cupy.cuda.Device().id

    def check(
        self,
        name: str,
        array: Any,
        shape: tuple[int | None, ...],
        dtypes: tuple[np.dtype, ...],
        *,
        writable: bool = False,
    ) -> Any:
        """The array as CuPy's, sharing its memory.

        Raises:
            ValueError: naming the argument, its value and the rule.
        """
        if not isinstance(array, self._cp.ndarray):
            if not hasattr(array, "__dlpack__") or isinstance(array, np.ndarray):
                raise ValueError(
                    f"{name} must be a CuPy or DLPack array on device='cuda' (got {type(array)!r})"
                )
            try:
                array = self._cp.from_dlpack(array)
            except Exception as error:  # of whatever library it came from
                raise ValueError(f"{name} must be a DLPack array on a GPU ({error})") from error
        if array.data.device_id != self._device_id:
            raise ValueError(
                f"{name} must be on this rank's GPU {self._device_id} (got GPU {array.device.id})"
            )
        check_form(name, array, shape, dtypes)
        return array

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> Any:
        return self._cp.ndarray(shape, dtype)

    def stream(self, stream: Any) -> contextlib.AbstractContextManager[Any]:
        """Work within it goes to `stream` (anything with ``__cuda_stream__``), or, for None, to
        CuPy's current one.

        Raises:
            ValueError: for anything else, or from a thread that is not on this rank's GPU.
        """
        current = self._cp.cuda.runtime.getDevice()
        if current != self._device_id:
            raise ValueError(
                f"the current GPU must be this rank's GPU {self._device_id} (got GPU {current})"
            )
        if stream is None:
            return contextlib.nullcontext()
        if isinstance(stream, self._cp.cuda.Stream):
            if stream.device_id not in (-1, self._device_id):
                raise ValueError(
                    f"stream must be on this rank's GPU {self._device_id} "
                    f"(got GPU {stream.device_id})"
                )
            return stream
        if not hasattr(stream, "__cuda_stream__"):
            raise ValueError(f"stream must have __cuda_stream__ or be None (got {stream!r})")
        return self._cp.cuda.Stream.from_external(stream)
