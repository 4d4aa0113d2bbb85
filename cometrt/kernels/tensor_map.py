"""CUtensorMap: how TMA finds a tile of a matrix. Encoded by the driver, passed by value."""

from __future__ import annotations

import ctypes
import functools
import math
from typing import Any

import numpy as np

from cometrt.errors import CometError
from cometrt.kernels.driver import driver_function
from cometrt.kernels.params import KernelArgument

_BFLOAT16 = 9  # CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
_SWIZZLE_128B = 3
_L2_PROMOTION_256B = 3
_MAP_BYTES = 128


def encode(pointer: int, shape: tuple[int, ...], box: tuple[int, ...]) -> KernelArgument:
    """The map of a C-contiguous bf16 array on the device, read in boxes; a kernel argument.

    Args:
        pointer: its address, a multiple of 16.
        shape, box: outermost first; the innermost box is at most 128 bytes, swizzled.

    Returns:
        128 bytes at a 128-byte aligned address; not to be written to.

    Raises:
        CometError: where the driver refuses it.
    """
    room = np.empty(2 * _MAP_BYTES, np.uint8)
    address = room.__array_interface__["data"][0]
    start = -address % _MAP_BYTES
    form = _form(shape, box)
    error = _encode_tiled()(address + start, _BFLOAT16, len(shape), pointer, *form)
    if error:
        raise CometError(f"no tensor map for shape {shape}, box {box}: CUDA error {error}")
    return KernelArgument(room[start : start + _MAP_BYTES].view(f"V{_MAP_BYTES}"))


@functools.lru_cache(maxsize=1024)
def _form(shape: tuple[int, ...], box: tuple[int, ...]) -> tuple[Any, ...]:
    """cuTensorMapEncodeTiled's arguments from the dimensions on. Memory comes and goes with every
    call of a layer, shapes stay."""
    rank = len(shape)
    strides_bytes = [2 * math.prod(shape[axis + 1 :]) for axis in range(rank - 1)]
    return (
        (ctypes.c_uint64 * rank)(*reversed(shape)),
        (ctypes.c_uint64 * max(rank - 1, 1))(*reversed(strides_bytes)),
        (ctypes.c_uint32 * rank)(*reversed(box)),
        (ctypes.c_uint32 * rank)(*([1] * rank)),
        0,  # interleave none
        _SWIZZLE_128B,
        _L2_PROMOTION_256B,
        0,  # out of bounds reads zero
    )


def _encode_tiled() -> Any:
    """The driver's function: (map, type of elements, dimensions, address, *_form) -> CUresult."""
    pointer, number = ctypes.c_void_p, ctypes.c_int
    argtypes = (pointer, number, ctypes.c_uint32, *[pointer] * 5, *[number] * 4)
    return driver_function("cuTensorMapEncodeTiled", *argtypes)
