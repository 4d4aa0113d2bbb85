"""Protocols: arrays of NumPy and CuPy, and the array operations of a device."""

from __future__ import annotations

import contextlib
from typing import Any, Protocol

import numpy as np


class Flags(Protocol):
    @property
    def c_contiguous(self) -> bool: ...


class Array(Protocol):
    """A numpy.ndarray or a cupy.ndarray, as far as the checks of arguments use it."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def strides(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def flags(self) -> Flags: ...
    def __len__(self) -> int: ...


class Arrays(Protocol):
    """The array operations of one device: `HostArrays` or `CudaArrays`. Its arrays are `Array`."""

    def check(
        self,
        name: str,
        array: Any,
        shape: tuple[int | None, ...],
        dtypes: tuple[np.dtype, ...],
        *,
        writable: bool = False,
    ) -> Any:
        """Check an argument and return it as an array of the device that shares its memory."""
        ...

    def address(self, array: Any) -> int: ...
    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> Any: ...
    def stream(self, stream: Any) -> contextlib.AbstractContextManager[Any]: ...
    def take_imported(self) -> list[Any]:
        """Arrays of other libraries that `check` has imported since the last call of this: their
        memory is theirs, and must outlive what is queued."""
        ...
