"""CUtensorMap: the descriptor by which TMA addresses the tiles of an array."""

from __future__ import annotations

import ctypes
import functools
import math
from typing import Any

import numpy as np

from cometrt.errors import CometError
from cometrt.kernels.driver import driver_function
from cometrt.kernels.params import KernelArgument

_ELEMENTS = {2: 9, 4: 7}  # bytes -> CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 and _FLOAT32
_SWIZZLE_128B = 3
_L2_PROMOTION_256B = 3
_MAP_BYTES = 128


def encode(
    pointer: int,
    shape: tuple[int, ...],
    box: tuple[int, ...],
    *,
    element_bytes: int = 2,
    strides: tuple[int, ...] | None = None,
) -> KernelArgument:
    """Encode the tensor map of an array on the device, with 128-byte swizzle.

    Args:
        pointer: address of the array, a multiple of 16.
        shape: of the array, outermost dimension first.
        box: shape of a tile. Its innermost dimension is at most 128 bytes.
        element_bytes: 2 for bf16, 4 for float32.
        strides: in elements, of all dimensions but the innermost; None: the array is C-contiguous.

    Returns:
        a kernel argument, passed by value. Its 128 bytes must not be modified.

    Raises:
        CometError: if the driver refuses it.
    """
    memory = np.empty(2 * _MAP_BYTES, np.uint8)
    address = memory.__array_interface__["data"][0]
    start = -address % _MAP_BYTES
    if strides is None:
        strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape) - 1))
    layout = _layout(shape, box, tuple(element_bytes * stride for stride in strides))
    element = _ELEMENTS[element_bytes]
    error = _encode_tiled()(address + start, element, len(shape), pointer, *layout)
    if error:
        raise CometError(f"no tensor map for shape {shape}, box {box}: CUDA error {error}")
    return KernelArgument(memory[start : start + _MAP_BYTES].view(f"V{_MAP_BYTES}"))


@functools.lru_cache(maxsize=1024)
def _layout(
    shape: tuple[int, ...], box: tuple[int, ...], strides_bytes: tuple[int, ...]
) -> tuple[Any, ...]:
    """The arguments of cuTensorMapEncodeTiled after the address.

    Cached, because every call of a layer has the same shapes, but not the same addresses.
    """
    rank = len(shape)
    return (
        (ctypes.c_uint64 * rank)(*reversed(shape)),
        (ctypes.c_uint64 * max(rank - 1, 1))(*reversed(strides_bytes)),
        (ctypes.c_uint32 * rank)(*reversed(box)),
        (ctypes.c_uint32 * rank)(*([1] * rank)),
        0,  # no interleave
        _SWIZZLE_128B,
        _L2_PROMOTION_256B,
        0,  # elements out of bounds read as zero
    )


def _encode_tiled() -> Any:
    """cuTensorMapEncodeTiled: (map, element type, dimensions, address, *_layout) -> CUresult."""
    pointer, number = ctypes.c_void_p, ctypes.c_int
    argtypes = (pointer, number, ctypes.c_uint32, *[pointer] * 5, *[number] * 4)
    return driver_function("cuTensorMapEncodeTiled", *argtypes)
