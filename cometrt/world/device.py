"""A rank's memory on its GPU, reached by its peers: plain allocations, shared by address."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy as np

from cometrt.world.layout import MAX_RANKS, control_dtype

if TYPE_CHECKING:
    from cometrt.world.base import World

# What peers in other processes may have open: kept from its making until its world is closed, or to
# the end of the process.
_reached_by_peers: set[DeviceMemory] = set()


@functools.cache
def _copy_stream(device_id: int) -> Any:
    """For copies that must not wait for the caller's stream; one a device, never destroyed."""
    import cupy

    with cupy.cuda.Device(device_id):
        return cupy.cuda.Stream(non_blocking=True)


class DeviceMemory:
    """Segments on the device, and the control block, which is one of them.

    Attributes:
        control: address of each rank's control block.
        last_call: event at the end of the last call of any layer of the world.
        report: of cometrt.cuda.report; made by the first layer.
    """

    def __init__(self, world: World) -> None:
        """Collective."""
        import cupy

        if world.size > MAX_RANKS:
            raise ValueError(f"ranks must be <= {MAX_RANKS} on device='cuda' (got {world.size})")
        # Made now, when nothing waits on the device; `abort` may come from another thread.
        self._copies = _copy_stream(cupy.cuda.Device().id)
        self._world = world
        pinned = cupy.cuda.alloc_pinned_memory(8)
        self._generation = np.frombuffer(pinned, np.uint64, 1)
        self._own: list[Any] = []  # cupy.cuda.MemoryPointer: freed with this object
        self._opened: list[int] = []  # of other processes
        self._retired: list[tuple[Any, Any]] = []  # (event or None, what is to be kept until then)
        self.last_call: Any = None
        self.report: Any = None
        _reached_by_peers.add(self)
        self.control = self.allocate(control_dtype.itemsize)
        self._control_field("generation").set(np.array([world.generation], np.uint64))
        cupy.cuda.get_current_stream().synchronize()

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
        """Stop what waits on the device, on all ranks, while it is waiting: by this rank's word in
        each control block, to which its kernels write the same in the same generation."""
        import cupy

        runtime = cupy.cuda.runtime
        self._generation[0] = generation
        offset = control_dtype.fields["abort"][1] + 8 * self._world.rank  # type: ignore[index]
        for pointer in self.control:
            runtime.memcpyAsync(
                pointer + offset,
                self._generation.ctypes.data,
                8,
                runtime.memcpyHostToDevice,
                self._copies.ptr,
            )

    def drain(self) -> None:
        """Wait for this rank's calls, on whatever stream, and for its aborts to arrive."""
        if self.last_call is not None:
            self.last_call.synchronize()
        self._copies.synchronize()
        self._forget_retired()

    def _forget_retired(self) -> None:
        """What is not used any more."""
        self._retired = [item for item in self._retired if item[0] is None or not item[0].done]

    def read_epoch(self) -> int:
        """After `drain`: nothing of this generation touches a peer any more then."""
        self.drain()
        return int(self._control_field("epoch").get()[0])

    def begin_generation(self, generation: int, epoch: int) -> None:
        """Kernels launched from now on belong to it; what went wrong before is forgotten."""
        import cupy

        for name, value in (("held", 0), ("epoch", epoch), ("generation", generation)):
            self._control_field(name).set(np.array([value], np.uint64))
        cupy.cuda.get_current_stream().synchronize()
        if self.report is not None:
            self.report.clear()

    def release_held_calls(self) -> None:
        """Calls that are queued from now on do something again. Those queued before do not,
        whenever the device comes to them: the release is queued behind them."""
        import cupy

        stream = cupy.cuda.get_current_stream()
        if self.last_call is not None:
            stream.wait_event(self.last_call)
        offset = control_dtype.fields["held"][1]  # type: ignore[index]
        (self._own[0] + offset).memset_async(0, 8, stream)
        self.last_call = stream.record(cupy.cuda.Event(disable_timing=True))
        self.last_call.synchronize()  # whatever stream the next call is on

    def retire(self, kept: Any, event: Any) -> None:
        """Keep what kernels use until the event, or, for None, as long as the world."""
        self._retired.append((event, kept))
        self._forget_retired()

    def close_peers(self) -> None:
        """Let go of other processes' memory, before they free it."""
        import cupy

        cupy.cuda.runtime.deviceSynchronize()
        while self._opened:
            self._world.close_device_memory(self._opened.pop())

    def close(self) -> None:
        """No peer in another process reaches this memory any more."""
        _reached_by_peers.discard(self)

    def _control_field(self, name: str) -> Any:
        import cupy

        cupy.cuda.get_current_stream().synchronize()
        offset = control_dtype.fields[name][1]  # type: ignore[index]
        return cupy.ndarray((1,), cupy.uint64, self._own[0] + offset)
