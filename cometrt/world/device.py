"""A rank's memory on its GPU, reached by its peers: plain allocations, shared by address."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy as np

from cometrt.world.layout import MAX_RANKS, control_dtype

if TYPE_CHECKING:
    from cometrt.world.base import World


@functools.cache
def _side_stream(device_id: int) -> Any:
    """For copies that must not wait for the caller's stream; one a device, never destroyed."""
    import cupy

    with cupy.cuda.Device(device_id):
        return cupy.cuda.Stream(non_blocking=True)


class DeviceMemory:
    """Segments on the device, and the control block, which is one of them."""

    def __init__(self, world: World) -> None:
        """Collective."""
        import cupy

        if world.size > MAX_RANKS:
            raise ValueError(f"ranks must be <= {MAX_RANKS} on device='cuda' (got {world.size})")
        # Made now, when nothing waits on the device; `abort` may come from another thread.
        self._copies = _side_stream(cupy.cuda.Device().id)
        self._world = world
        pinned = cupy.cuda.alloc_pinned_memory(8)
        self._generation = np.frombuffer(pinned, np.uint64, 1)
        self._own: list[Any] = []  # cupy.cuda.MemoryPointer: freed with this object
        self._opened: list[int] = []  # of other processes
        self.last_call: Any = None  # event at the end of the last call of any layer of the world
        self.control = self.allocate(control_dtype.itemsize)  # address of each rank's

    def allocate(self, nbytes: int) -> list[int]:
        """Collective: zeroed memory of every rank, as addresses on this rank's device.

        What was there before is kept to the end: a peer may still be reading it.
        """
        import cupy

        if self._world.shares_gpu:
            # From the pool: freeing plain memory waits for the whole device, and the garbage
            # collector may do it while a kernel of another world waits for a peer.
            memory = cupy.cuda.alloc(nbytes)
        else:
            memory = cupy.cuda.MemoryPointer(cupy.cuda.Memory(nbytes), 0)
        cupy.cuda.runtime.memset(memory.ptr, 0, nbytes)
        cupy.cuda.runtime.deviceSynchronize()
        self._own.append(memory)
        pointers = self._world.share_device_memory(memory.ptr)
        self._opened += [pointer for pointer in pointers if pointer != memory.ptr]
        return pointers

    def poison(self, pointer: int, nbytes: int) -> None:
        import cupy

        cupy.cuda.runtime.memset(pointer, 0xFF, nbytes)
        cupy.cuda.runtime.deviceSynchronize()

    def abort(self, generation: int) -> None:
        """Stop what waits on the device, on all ranks, while it is waiting."""
        import cupy

        runtime = cupy.cuda.runtime
        self._generation[0] = generation
        offset = control_dtype.fields["abort"][1]  # type: ignore[index]
        for pointer in self.control:
            runtime.memcpyAsync(
                pointer + offset,
                self._generation.ctypes.data,
                8,
                runtime.memcpyHostToDevice,
                self._copies.ptr,
            )

    def read_epoch(self) -> int:
        """When this rank's calls have ended, on whatever stream, and its aborts have arrived:
        nothing of this generation touches a peer any more."""
        import cupy

        if self.last_call is not None:
            self.last_call.synchronize()
        _side_stream(cupy.cuda.Device().id).synchronize()
        return int(self._epoch().get()[0])

    def write_epoch(self, epoch: int) -> None:
        self._epoch().set(np.array([epoch], np.uint64))

    def _epoch(self) -> Any:
        import cupy

        cupy.cuda.get_current_stream().synchronize()
        offset = control_dtype.fields["epoch"][1]  # type: ignore[index]
        return cupy.ndarray((1,), cupy.uint64, self._own[0] + offset)

    def close_peers(self) -> None:
        """Let go of other processes' memory, before they free it."""
        import cupy

        cupy.cuda.runtime.deviceSynchronize()
        for pointer in self._opened:
            cupy.cuda.runtime.ipcCloseMemHandle(pointer)
        self._opened.clear()
