"""CUtensorMap: how TMA finds a tile of a matrix. Encoded by the driver, passed by value."""

from __future__ import annotations

import ctypes
import functools

import numpy as np

from cometrt.errors import CometError

_BFLOAT16 = 9  # CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
_SWIZZLE_128B = 3
_L2_PROMOTION_256B = 3
_MAP_BYTES = 128


@functools.lru_cache(maxsize=4096)
def encode(pointer: int, shape: tuple[int, ...], box: tuple[int, ...]) -> np.ndarray:
    """The map of a C-contiguous bf16 array on the device, read in boxes; a kernel argument.

    Args:
        pointer: its address, a multiple of 16.
        shape, box: outermost first; the innermost box is at most 128 bytes, swizzled.

    Returns:
        size-1 array of dtype V128, at a 128-byte aligned address; not to be written to.

    Raises:
        CometError: where the driver refuses it.
    """
    rank = len(shape)
    dims = (ctypes.c_uint64 * rank)(*reversed(shape))
    strides_bytes = [2 * int(np.prod(shape[axis + 1 :])) for axis in range(rank - 1)]
    strides = (ctypes.c_uint64 * max(rank - 1, 1))(*reversed(strides_bytes))
    boxes = (ctypes.c_uint32 * rank)(*reversed(box))
    ones = (ctypes.c_uint32 * rank)(*([1] * rank))
    room = np.zeros(2 * _MAP_BYTES, np.uint8)
    start = -room.ctypes.data % _MAP_BYTES
    aligned = room[start : start + _MAP_BYTES]
    error = _driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(aligned.ctypes.data),
        ctypes.c_int(_BFLOAT16),
        ctypes.c_uint32(rank),
        ctypes.c_void_p(pointer),
        dims,
        strides,
        boxes,
        ones,
        ctypes.c_int(0),  # interleave none
        ctypes.c_int(_SWIZZLE_128B),
        ctypes.c_int(_L2_PROMOTION_256B),
        ctypes.c_int(0),  # out of bounds reads zero
    )
    if error:
        raise CometError(f"no tensor map for shape {shape}, box {box}: CUDA error {error}")
    return aligned.view(f"V{_MAP_BYTES}")


@functools.cache
def _driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise CometError(f"tensor maps need an NVIDIA driver ({error})") from error
