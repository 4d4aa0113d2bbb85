"""Checks of the arrays a caller hands in: dtype, shape, layout; each error names all three."""

from __future__ import annotations

from typing import Any

import numpy as np


def check_array(
    name: str,
    array: Any,
    shape: tuple[int | None, ...],
    dtypes: tuple[np.dtype, ...],
    *,
    writable: bool = False,
) -> np.ndarray:
    """`array` if it is a C-contiguous NumPy array of that shape (None: any length) and dtype.

    Raises:
        ValueError: naming the argument, its value and the rule.
    """
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{name} must be a numpy.ndarray on device='host' (got {type(array)!r})")
    if array.dtype not in dtypes:
        rule = " or ".join(str(dtype) for dtype in dtypes)
        raise ValueError(f"{name} must have dtype {rule} (got {array.dtype})")
    fits = len(array.shape) == len(shape) and all(
        want is None or want == have for want, have in zip(shape, array.shape, strict=True)
    )
    if not fits:
        rule = ", ".join("T" if length is None else str(length) for length in shape)
        raise ValueError(f"{name} must have shape ({rule}) (got {array.shape})")
    if not array.flags.c_contiguous:
        raise ValueError(f"{name} must be C-contiguous (got strides {array.strides})")
    if writable and not array.flags.writeable:
        raise ValueError(f"{name} must be writable (got a read-only array)")
    return array
