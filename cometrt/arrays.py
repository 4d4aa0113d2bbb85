"""Checks of the caller's arrays: dtype, shape and layout."""

from __future__ import annotations

import contextlib

import numpy as np

from cometrt.specs import check_unmasked
from cometrt.types import Array


class HostArrays:
    """The layer's array operations on device="host": NumPy arrays, and DLPack arrays as NumPy's."""

    def check(
        self,
        name: str,
        array: object,
        shape: tuple[int | None, ...],
        dtypes: tuple[np.dtype, ...],
        *,
        writable: bool = False,
    ) -> np.ndarray:
        """Check an argument and return it as a NumPy array that shares its memory.

        Args:
            name: of the argument, for the error.
            shape: required lengths; None: any length.
            dtypes: the dtypes that are allowed.
            writable: whether the array must be writable.

        Raises:
            ValueError: naming the argument, its value and the rule. C-contiguity is required too.
        """
        if not isinstance(array, np.ndarray):
            array = _from_dlpack(name, array)
        check_unmasked(name, array)
        check_form(name, array, shape, dtypes)
        if writable and not array.flags.writeable:
            raise ValueError(f"{name} must be writable (got a read-only array)")
        return array

    def address(self, array: np.ndarray) -> int:
        return int(array.ctypes.data)

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        return np.empty(shape, dtype)

    def stream(self, stream: object) -> contextlib.AbstractContextManager[None]:
        if stream is not None:
            raise ValueError(f"stream must be None on device='host' (got {stream!r})")
        return contextlib.nullcontext()

    def take_imported(self) -> list[np.ndarray]:
        """None: nothing is queued on the host."""
        return []


def _from_dlpack(name: str, array: object) -> np.ndarray:
    if not hasattr(array, "__dlpack__"):
        raise ValueError(
            f"{name} must be a numpy.ndarray on device='host' (got {type(array)!r}), "
            f"or any DLPack array in the host's memory"
        )
    try:
        return np.from_dlpack(array)
    except Exception as error:  # each library raises its own types
        raise ValueError(
            f"{name} must be an array that NumPy can import by DLPack (got {type(array)!r}: "
            f"{error}). NumPy imports neither bfloat16 nor GPU memory by DLPack: pass "
            f"np.asarray(x) for a JAX array x, x.view(torch.int16).numpy().view('bfloat16') for a "
            f"PyTorch tensor"
        ) from error


def check_form(
    name: str, array: Array, shape: tuple[int | None, ...], dtypes: tuple[np.dtype, ...]
) -> None:
    """Raise a ValueError unless dtype and shape are as required and the array is C-contiguous."""
    if array.dtype not in dtypes:
        rule = " or ".join(str(dtype) for dtype in dtypes)
        raise ValueError(f"{name} must have dtype {rule} (got {array.dtype})")
    found = array.shape
    if found != shape and (shape[0] is not None or not found or found[1:] != shape[1:]):
        rule = ", ".join("T" if length is None else str(length) for length in shape)
        hint = ": the experts of this rank, as shard_weights returns them"
        hint = hint if name in ("w_up", "w_down") else ""
        raise ValueError(f"{name} must have shape ({rule}) (got {array.shape}){hint}")
    if not array.flags.c_contiguous:
        raise ValueError(f"{name} must be C-contiguous (got strides {array.strides})")
