"""`DeviceMemory`: a rank's GPU memory that peers access by address."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cometrt.kernels.constants import MAX_RANKS
from cometrt.world.layout import device_control_block_dtype

if TYPE_CHECKING:
    from cometrt.world.base import World

_log = logging.getLogger("cometrt")

# Keeps memory alive that peers in other processes may have open: until the world is closed, or
# until the process ends.
_open_to_peers: set[DeviceMemory] = set()


@functools.cache
def _copy_stream(device_id: int) -> Any:
    """A stream for copies that must not wait for the caller's stream; one per device, forever."""
    import cupy

    with cupy.cuda.Device(device_id):
        return cupy.cuda.Stream(non_blocking=True)


class DeviceMemory:
    """One rank's control block and allocations on its GPU.

    Attributes:
        control: address of each rank's control block.
        own: this rank's allocations, by address.
        opened: addresses of peers' allocations.
        last_call: event at the end of the last call of any layer of the world; None: no call yet.
        captured: whether a CUDA graph holds a captured call, which may be replayed at any time.
        report: the failure reports of `cometrt.cuda.report`; the first layer makes them.
    """

    def __init__(self, world: World) -> None:
        """Collective."""
        import cupy

        if world.size > MAX_RANKS:
            raise ValueError(f"ranks must be <= {MAX_RANKS} on device='cuda' (got {world.size})")
        # Created here, because creating a stream while a kernel waits for a peer could deadlock.
        self._copies = _copy_stream(cupy.cuda.Device().id)
        self._world = world
        # Pinned host memory of the copies: one generation, and the epochs of all ranks.
        pinned = cupy.cuda.alloc_pinned_memory(8 * (1 + world.size))
        values = np.frombuffer(pinned, np.uint64, 1 + world.size)
        self._generation, self._epochs = values[:1], values[1:]
        self.own: dict[int, Any] = {}  # of cupy.cuda.MemoryPointer
        self.opened: list[int] = []
        self._retired: list[tuple[Any, Any]] = []  # (event or None, object to keep until then)
        self.last_call: Any = None
        self.report: Any = None
        _open_to_peers.add(self)
        self.captured = False
        self.control = self.allocate(device_control_block_dtype.itemsize)
        self.control_field("generation").set(np.array([world.generation], np.uint64))
        cupy.cuda.get_current_stream().synchronize()

    def allocate(self, nbytes: int) -> list[int]:
        """Collective: zeroed memory of every rank, as addresses on this rank's device.

        When it returns, all earlier calls of this rank have ended.
        """
        import cupy

        if self._world.shares_gpu:
            # Use the pool: cudaFree waits for the whole device, and the garbage collector could
            # call it while a kernel of another world waits for a peer.
            memory = cupy.cuda.alloc(nbytes)
        else:
            memory = cupy.cuda.MemoryPointer(cupy.cuda.Memory(nbytes), 0)
        cupy.cuda.runtime.memset(memory.ptr, 0, nbytes)
        cupy.cuda.runtime.deviceSynchronize()
        self.own[memory.ptr] = memory
        pointers = self._world.share_device_memory(memory.ptr)
        self.opened += [pointer for pointer in pointers if pointer != memory.ptr]
        return pointers

    def memory(self, pointer: int) -> Any:
        """This rank's own allocation at that address, as a cupy.cuda.MemoryPointer.

        An array over it keeps it alive.
        """
        return self.own[pointer]

    def free(self, allocations: list[list[int]]) -> None:
        """Collective, after the calls of all ranks have ended: free results of `allocate`.

        If a rank has captured calls, or cannot close a peer's memory, all of it is kept.
        """
        rank, world, problem = self._world.rank, self._world, ""
        if any(world.allgather(self.captured, purpose="free")):
            return
        try:
            for pointers in allocations:
                self._close([pointer for pointer in pointers if pointer != pointers[rank]])
        except Exception as error:  # an error of CUDA only means that memory is kept
            problem = str(error)
        if any(problems := world.allgather(problem, purpose="free")):
            _log.warning("memory of outgrown layers is kept: %s", "; ".join(filter(None, problems)))
            return
        for pointers in allocations:
            del self.own[pointers[rank]]
        world.barrier()  # freeing may wait for kernels, so no kernel may wait for a peer yet

    def _close(self, pointers: list[int]) -> None:
        for pointer in pointers:
            self._world.close_device_memory(pointer)
            self.opened.remove(pointer)

    def poison(self, pointer: int, nbytes: int) -> None:
        """Set all bytes to 0xFF: NaN in bfloat16, -1 in integers."""
        import cupy

        cupy.cuda.runtime.memset(pointer, 0xFF, nbytes)
        cupy.cuda.runtime.deviceSynchronize()

    def abort(self, generation: int) -> None:
        """End the waits of running kernels on all ranks.

        Writes the generation to abort[rank] of each control block. This rank's kernels write the
        same value there if they fail themselves.
        """
        import cupy

        runtime = cupy.cuda.runtime
        self._generation[0] = generation
        offset = device_control_block_dtype.fields["abort"][1] + 8 * self._world.rank  # type: ignore[index]
        for pointer in self.control:
            runtime.memcpyAsync(
                pointer + offset,
                self._generation.ctypes.data,
                8,
                runtime.memcpyHostToDevice,
                self._copies.ptr,
            )

    def complete_abort(self) -> None:
        """Wait until kernels on all ranks see what `abort` has written, but for no kernel."""
        self._copies.synchronize()

    def drain(self) -> None:
        """Wait for all calls of this rank, on any stream, and for the copies of `abort`."""
        import cupy

        if self.captured:  # the streams of replays are unknown here
            cupy.cuda.runtime.deviceSynchronize()
        if self.last_call is not None:
            self.last_call.synchronize()
        self._copies.synchronize()
        self._drop_retired()

    def _drop_retired(self) -> None:
        """Drop the retired objects whose event has completed."""
        self._retired = [
            (event, kept) for event, kept in self._retired if event is None or not event.done
        ]

    def read_epoch(self) -> int:
        """This rank's epoch on the device, after `drain`: its kernels touch no peer any more."""
        self.drain()
        return int(self.control_field("epoch").get()[0])

    def read_epochs(self, ranks: Sequence[int]) -> list[int]:
        """The current epochs on the devices of `ranks`, without waiting for a kernel."""
        import cupy

        runtime = cupy.cuda.runtime
        offset = device_control_block_dtype.fields["epoch"][1]  # type: ignore[index]
        for rank in ranks:
            runtime.memcpyAsync(
                self._epochs[rank:].ctypes.data,
                self.control[rank] + offset,
                8,
                runtime.memcpyDeviceToHost,
                self._copies.ptr,
            )
        self._copies.synchronize()
        return [int(self._epochs[rank]) for rank in ranks]

    def begin_generation(self, generation: int, epoch: int) -> None:
        """Start a generation on this rank's device: reset its control fields and reports."""
        import cupy

        # Ranks that failed at different times have begun different numbers of calls.
        fields = {"held": 0, "epoch": epoch, "rail_calls": generation << 32}
        for name, value in (fields | {"generation": generation}).items():
            self.control_field(name).set(np.array([value], np.uint64))
        cupy.cuda.get_current_stream().synchronize()
        if self.report is not None:
            self.report.clear()

    def release_held_calls(self) -> None:
        """Let later calls run again after a failed call. Calls queued earlier still do nothing.

        The write to the control block is queued behind them, on the last call's event.
        """
        import cupy

        stream = cupy.cuda.get_current_stream()
        if self.last_call is not None:
            stream.wait_event(self.last_call)
        offset = device_control_block_dtype.fields["held"][1]  # type: ignore[index]
        (self._control + offset).memset_async(0, 8, stream)
        self.last_call = stream.record(cupy.cuda.Event(disable_timing=True))
        self.last_call.synchronize()  # the next call may use another stream

    def retire(self, kept: object, event: Any) -> None:
        """Keep an object that kernels use until `event` completes; None: as long as the world."""
        self._retired.append((event, kept))
        self._drop_retired()

    def close_peers(self) -> None:
        """Close the memory of other processes, before they free it."""
        import cupy

        cupy.cuda.runtime.deviceSynchronize()
        self._close(list(self.opened))

    def close(self) -> None:
        """Stop keeping this memory alive: no peer in another process has it open."""
        _open_to_peers.discard(self)

    @property
    def _control(self) -> Any:
        return self.memory(self.control[self._world.rank])

    def control_field(self, name: str) -> Any:
        import cupy

        cupy.cuda.get_current_stream().synchronize()
        offset = device_control_block_dtype.fields[name][1]  # type: ignore[index]
        return cupy.ndarray((1,), cupy.uint64, self._control + offset)
