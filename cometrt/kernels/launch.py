"""Loading and launching kernels: nothing else in the package does either."""

from __future__ import annotations

import ctypes
import functools
from typing import TYPE_CHECKING, Any

import numpy as np

from cometrt.errors import CometError
from cometrt.kernels.compiler import compile_cubin, kernels_folder
from cometrt.kernels.driver import driver_function
from cometrt.kernels.elf import constants
from cometrt.kernels.params import KernelArgument

if TYPE_CHECKING:
    from cupy import RawKernel

Macros = tuple[tuple[str, int], ...]


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute."""

    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", ctypes.c_int * 16))


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("num_attributes", ctypes.c_uint),
    )


# CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
_BEGINS_EARLY = ctypes.pointer(_Attribute(6, b"", (1,)))


class Kernel:
    """A kernel on one device. Arguments go by value.

    A kernel of a file that exports `begins_early` may begin while the kernel in front of it on the
    stream ends (programmatic dependent launch): see wait_for_previous_kernel() of
    kernels_cu/hopper/memory.cuh.

    Attributes:
        block: threads of a CTA, from the kernel's launch bounds.
        shared_bytes: dynamic shared memory of a launch, unless it says otherwise.
    """

    def __init__(
        self, function: RawKernel, shared_bytes: int = 0, *, begins_early: bool = False
    ) -> None:
        self._function, self._handle = function, function.kernel.ptr
        self._num_attributes = int(begins_early)
        self.block, self.shared_bytes = int(function.max_threads_per_block), 0
        # config, function, addresses of arguments, none
        pointer, config = ctypes.c_void_p, ctypes.POINTER(_Config)
        self._launch = driver_function("cuLaunchKernelEx", config, *[pointer] * 3)
        self.allow_shared(shared_bytes)

    def __call__(self, stream: int, grid: int, *arguments: KernelArgument | np.generic) -> None:
        """Launch on a raw stream, by the driver itself: that takes half of the time of CuPy's
        launch. A scalar that never changes is best made a KernelArgument once.

        Raises:
            CometError: where the driver refuses it.
        """
        values = [a if isinstance(a, KernelArgument) else KernelArgument(a) for a in arguments]
        pointers = (ctypes.c_void_p * len(values))(*[value.address for value in values])
        config = _Config(
            (grid, 1, 1),
            (self.block, 1, 1),
            self.shared_bytes,
            stream,
            _BEGINS_EARLY,
            self._num_attributes,
        )
        error = self._launch(config, self._handle, pointers, None)
        if error:
            raise CometError(
                f"no launch of {grid} x {self.block} threads with {self.shared_bytes} bytes of "
                f"shared memory: CUDA error {error}"
            )

    def allow_shared(self, shared_bytes: int) -> None:
        """Dynamic shared memory of later launches. Best set before any kernel waits for a peer."""
        self.shared_bytes = shared_bytes
        if shared_bytes > self._function.max_dynamic_shared_size_bytes:
            self._function.max_dynamic_shared_size_bytes = shared_bytes

    def with_shared(self, shared_bytes: int) -> Kernel:
        """The same kernel for launches with another amount of dynamic shared memory."""
        early = bool(self._num_attributes)
        return Kernel(self._function, shared_bytes, begins_early=early)


def load_kernels(source: str, *names: str, macros: Macros = ()) -> tuple[Kernel, ...]:
    """Kernels of a file of kernels_cu with those macros, on this device; compiled where they are
    not cached.

    Load all of them before the first kernel that waits for a peer: loading may wait for the
    device.
    """
    import cupy

    return _load(cupy.cuda.Device().id, source, names, macros)


@functools.cache
def _load(device_id: int, source: str, names: tuple[str, ...], macros: Macros) -> tuple[Any, ...]:
    """Cached by device, since each has its own copy of the module and of its kernels' limits."""
    import cupy

    path = compile_cubin(kernels_folder() / source, macros).path
    module, found = cupy.RawModule(path=str(path)), constants(path)
    shared_bytes, early = found.get("shared_bytes", 0), bool(found.get("begins_early", 0))
    functions = map(module.get_function, names)
    return tuple(Kernel(one, shared_bytes, begins_early=early) for one in functions)
