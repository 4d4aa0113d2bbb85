"""Checks and results for arrays on the device: CuPy's, or any that speaks DLPack."""

from __future__ import annotations

import contextlib
import ctypes
from typing import Any

import numpy as np

from cometrt.arrays import check_form


class _VersionedTensor(ctypes.Structure):
    """The beginning of DLPack's DLManagedTensorVersioned."""

    _fields_ = (
        ("version", ctypes.c_uint32 * 2),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
    )


_ALIGNMENT = 16  # bytes
_ON_CURRENT_STREAM = contextlib.nullcontext()
_VERSIONED, _READ_ONLY = b"dltensor_versioned", 1
# (capsule, its name) -> the pointer in it.
capsule_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


def is_writable(array: Any) -> bool:
    """Whether another library's array says that it may be written to, by DLPack 1 or the CUDA array
    interface. Older DLPack says nothing, which means no, as NumPy has it."""
    with contextlib.suppress(Exception):  # of libraries that have it, but not for every dtype
        return not array.__cuda_array_interface__["data"][1]
    for stream in ({"stream": -1}, {}):  # nothing is to be waited for; the host's arrays have none
        try:
            capsule = array.__dlpack__(max_version=(1, 0), **stream)
            break
        except Exception:  # of an older DLPack
            capsule = None
    try:
        tensor = _VersionedTensor.from_address(capsule_pointer(capsule, _VERSIONED))
    except ValueError:  # no capsule of that name
        return False
    return not tensor.flags & _READ_ONLY


class CudaArrays:
    """`cometrt.arrays.HostArrays` for device="cuda"."""

    def __init__(self) -> None:
        import cupy

        self._cp, self._ndarray = cupy, cupy.ndarray
        self._device_id = cupy.cuda.Device().id
        self._imported: list[Any] = []

    def check(
        self,
        name: str,
        array: Any,
        shape: tuple[int | None, ...],
        dtypes: tuple[np.dtype, ...],
        *,
        writable: bool = False,
    ) -> Any:
        """The array as CuPy's, sharing its memory. What its producer has queued happens before what
        is queued on CuPy's current stream from now on.

        Raises:
            ValueError: naming the argument, its value and the rule.
        """
        if not isinstance(array, self._ndarray):
            given = array
            if not hasattr(array, "__dlpack__") or isinstance(array, np.ndarray):
                raise ValueError(
                    f"{name} must be a CuPy or DLPack array on device='cuda' (got {type(array)!r})"
                )
            try:
                array = self._cp.from_dlpack(array)
            except Exception as error:  # of whatever library it came from
                raise ValueError(f"{name} must be a DLPack array on a GPU ({error})") from error
            self._imported.append(array)
            if writable and not is_writable(given):
                raise ValueError(
                    f"{name} must be writable: a CuPy array, or one whose library says that it may "
                    f"be written to (got {type(given)!r}, which does not)"
                )
        data = array.data
        if data.device_id != self._device_id:
            raise ValueError(
                f"{name} must be on this rank's GPU {self._device_id} (got GPU {array.device.id})"
            )
        if (
            array.dtype not in dtypes
            or array.shape != shape
            or not array._c_contiguous  # CuPy makes an object for `flags`
            or data.ptr % _ALIGNMENT
        ):  # these look more closely, and may find nothing wrong
            check_form(name, array, shape, dtypes)
            _check_alignment(name, array)
        return array

    def take_imported(self) -> list[Any]:
        """As `cometrt.types.Arrays.take_imported`."""
        imported, self._imported = self._imported, []
        return imported

    def address(self, array: Any) -> int:
        return int(array.data.ptr)

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
            return _ON_CURRENT_STREAM
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


def _check_alignment(name: str, array: Any) -> None:
    """Rows, weights and their gradients are moved by 16 bytes; tables element by element."""
    itemsize = array.dtype.itemsize
    wanted = _ALIGNMENT if itemsize == 2 or len(array.shape) == 3 else itemsize
    if array.size and array.data.ptr % wanted:
        raise ValueError(
            f"{name} must begin at a multiple of {wanted} bytes (got address "
            f"{array.data.ptr:#x}; a view of another array may begin anywhere)"
        )
