"""What this package asks of arrays and pointers on the device, and what kernels are launched by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np


class DevicePointer(Protocol):
    ptr: int


class DeviceArray(Protocol):
    """CuPy's, C-contiguous."""

    shape: tuple[int, ...]
    dtype: np.dtype
    nbytes: int

    @property
    def data(self) -> DevicePointer: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any) -> Any: ...

    def __setitem__(self, index: Any, value: Any) -> None: ...

    def fill(self, value: Any) -> None: ...

    def get(self) -> np.ndarray: ...


# A layer's launches by name. Each takes a raw stream, and what its kernel is launched with.
Launches = dict[str, Callable[..., None]]
