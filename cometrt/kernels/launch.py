"""The one place where kernels are loaded and launched."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import numpy as np

from cometrt.errors import CometError
from cometrt.kernels.compiler import compile_cubin, kernels_folder
from cometrt.kernels.driver import driver_function
from cometrt.kernels.params import KernelArgument


class Kernel:
    """A kernel on one device; arguments go by value.

    Args:
        function: CuPy's.
    """

    def __init__(self, function: Any) -> None:
        import cupy

        self._function, self._handle = function, function.kernel.ptr
        # function, grid, block, bytes of shared memory, stream, addresses of arguments, none
        pointer, number = ctypes.c_void_p, ctypes.c_uint
        self._launch = driver_function("cuLaunchKernel", pointer, *[number] * 7, *[pointer] * 3)
        self._current_stream = cupy.cuda.get_current_stream
        self._shared_bytes = 0

    def __call__(
        self,
        grid: tuple[int],
        block: int,
        *arguments: KernelArgument | np.generic,
        shared_bytes: int = 0,
    ) -> None:
        """Launch on CuPy's current stream: by the driver itself, which takes half of what CuPy's
        way does. Scalars that never change are best made an KernelArgument once.

        Raises:
            CometError: where the driver refuses it.
        """
        if shared_bytes > self._shared_bytes:
            self.allow_shared(shared_bytes)
        values = [a if isinstance(a, KernelArgument) else KernelArgument(a) for a in arguments]
        pointers = (ctypes.c_void_p * len(values))(*[value.address for value in values])
        error = self._launch(
            self._handle, grid[0], 1, 1, block, 1, 1, shared_bytes,
            self._current_stream().ptr, pointers, None,
        )  # fmt: skip
        if error:
            raise CometError(
                f"no launch of {grid[0]} x {block} threads with {shared_bytes} bytes of shared "
                f"memory: CUDA error {error}"
            )

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
