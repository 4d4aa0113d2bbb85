"""The one place where kernels are loaded and launched."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from cometrt.kernels.compiler import compile_cubin, kernels_folder
from cometrt.kernels.params import Record


class Kernel:
    """A kernel that takes its arguments by value: Records, tensor maps, NumPy scalars."""

    def __init__(self, function: Any) -> None:
        from cupy.cuda import runtime

        self._function, self._device = function, runtime.getDevice
        self._shared_bytes: dict[int, int] = {}  # by device: each has loaded it anew

    def load(self) -> None:
        """On this device; nothing where that has been done."""
        _ = self._function.kernel

    def __call__(
        self,
        grid: tuple[int, ...],
        block: int,
        *arguments: Record | np.ndarray | np.generic,
        shared_bytes: int = 0,
    ) -> None:
        """Launch on CuPy's current stream."""
        if shared_bytes > self._shared_bytes.get(self._device(), 0):
            self.allow_shared(shared_bytes)
        by_value = tuple([a.raw if isinstance(a, Record) else a for a in arguments])
        self._function(grid, (block,), by_value, shared_mem=shared_bytes)

    def allow_shared(self, shared_bytes: int) -> None:
        """What launches may ask for; done once, best before any kernel waits for a peer."""
        device = self._device()
        self._shared_bytes[device] = max(shared_bytes, self._shared_bytes.get(device, 0))
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
    kernels = _kernels(source, names, defines)
    for kernel in kernels:
        kernel.load()
    return kernels


@functools.cache
def _kernels(
    source: str, names: tuple[str, ...], defines: tuple[tuple[str, int], ...]
) -> tuple[Kernel, ...]:
    import cupy

    module = cupy.RawModule(path=str(compile_cubin(kernels_folder() / source, defines).path))
    return tuple(Kernel(module.get_function(name)) for name in names)
