"""The driver's own functions, for what a call of a layer does most often: by ctypes, which costs
the host least."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

from cometrt.errors import CometError


@functools.cache
def driver_function(name: str, *argtypes: Any) -> Any:
    """A function of libcuda that returns a CUresult: 0, or an error's number.

    Raises:
        CometError: where there is no driver.
    """
    try:
        function = getattr(ctypes.CDLL("libcuda.so.1"), name)
    except OSError as error:
        raise CometError(f"{name} needs an NVIDIA driver ({error})") from error
    function.argtypes = argtypes
    return function
