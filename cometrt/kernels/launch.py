"""The one place where kernels are loaded and launched."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from cometrt.kernels.compiler import compile_cubin, kernels_folder
from cometrt.kernels.params import Record


class Kernel:
    """A kernel on one device; arguments go by value: Records, tensor maps, NumPy scalars."""

    def __init__(self, function: Any) -> None:
        self._function = function
        self._shared_bytes = 0

    def __call__(
        self,
        grid: tuple[int, ...],
        block: int,
        *arguments: Record | np.ndarray | np.generic,
        shared_bytes: int = 0,
    ) -> None:
        """Launch on CuPy's current stream."""
        if shared_bytes > self._shared_bytes:
            self.allow_shared(shared_bytes)
        by_value = tuple([a.raw if isinstance(a, Record) else a for a in arguments])
        self._function(grid, (block,), by_value, shared_mem=shared_bytes)

    def allow_shared(self, shared_bytes: int) -> None:
        """What launches may ask for; done once, best before any kernel waits for a peer."""
        self._shared_bytes = max(shared_bytes, self._shared_bytes)
        if shared_bytes > self._function.max_dynamic_shared_size_bytes:
            self._function.max_dynamic_shared_size_bytes = shared_bytes


def load_kernels(
    source: str, *names: str, defines: tuple[tuple[str, int], ...] = ()
) -> tuple[Kernel, ...]:
    """Kernels of a file of kernels_cu with those macros, compiled where they are not cached, on
    this device.

    Load all of them before the first kernel that waits for a peer: loading may wait for the
    device.
    """
    import cupy

    return _load(cupy.cuda.Device().id, source, names, defines)


@functools.cache
def _load(
    device_id: int, source: str, names: tuple[str, ...], defines: tuple[tuple[str, int], ...]
) -> tuple[Kernel, ...]:
    """By device: each has a copy of the module, and of what a kernel is allowed."""
    import cupy

    module = cupy.RawModule(path=str(compile_cubin(kernels_folder() / source, defines).path))
    return tuple(Kernel(module.get_function(name)) for name in names)
