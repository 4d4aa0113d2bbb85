"""The one place where kernels are loaded and launched."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from cometrt.kernels.compiler import compile_cubin, kernels_folder


class Kernel:
    """A kernel whose only argument is its params struct (and what else it takes by value)."""

    def __init__(self, function: Any) -> None:
        self._function = function

    def __call__(
        self,
        grid: tuple[int, ...],
        block: int,
        params: np.ndarray,
        *more: Any,
        shared_bytes: int = 0,
    ) -> None:
        """Launch on CuPy's current stream. `params` is a size-1 array of the struct's mirror."""
        self.allow_shared(shared_bytes)
        by_value = params.view(f"V{params.dtype.itemsize}")
        self._function(grid, (block,), (by_value, *more), shared_mem=shared_bytes)

    def allow_shared(self, shared_bytes: int) -> None:
        """What launches may ask for; done once, best before any kernel waits for a peer."""
        if shared_bytes > self._function.max_dynamic_shared_size_bytes:
            self._function.max_dynamic_shared_size_bytes = shared_bytes


@functools.cache
def load_kernels(
    source: str, *names: str, defines: tuple[tuple[str, int], ...] = ()
) -> tuple[Kernel, ...]:
    """Kernels of a file of kernels_cu with those macros, compiled where they are not cached, on
    this device.

    Load all of them before the first kernel that waits for a peer: loading may wait for the
    device.
    """
    import cupy

    module = cupy.RawModule(path=str(compile_cubin(kernels_folder() / source, defines).path))
    return tuple(Kernel(module.get_function(name)) for name in names)
