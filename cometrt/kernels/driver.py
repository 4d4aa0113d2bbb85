"""Functions of the CUDA driver through ctypes, for the host's most frequent calls.

A ctypes call costs the host less time than the same call through CuPy or cuda-python.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

from cometrt.errors import CometError


@functools.cache
def driver_function(name: str, *argtypes: Any) -> Any:
    """A function of libcuda with the given ctypes argument types. It returns a CUresult (0: OK).

    Raises:
        CometError: if there is no NVIDIA driver.
    """
    try:
        function = getattr(ctypes.CDLL("libcuda.so.1"), name)
    except OSError as error:
        raise CometError(f"{name} needs an NVIDIA driver ({error})") from error
    function.argtypes = argtypes
    return function
