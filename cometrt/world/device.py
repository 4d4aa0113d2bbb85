"""A rank's memory on its GPU, reached by its peers: plain allocations, shared by address."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cometrt.world.layout import MAX_RANKS, device_control_block_dtype

if TYPE_CHECKING:
    from cometrt.world.base import World

_log = logging.getLogger("cometrt")

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
    """Regions on the device, and the control block, which is one of them.

    Attributes:
        control: address of each rank's control block.
        last_call: event at the end of the last call of any layer of the world.
        captured: whether a call has been captured in a CUDA graph, which may be replayed any time.
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
        # The copies' memory on the host: a generation, and all ranks' epochs.
        pinned = cupy.cuda.alloc_pinned_memory(8 * (1 + world.size))
        words = np.frombuffer(pinned, np.uint64, 1 + world.size)
        self._generation, self._epochs = words[:1], words[1:]
        self._own: dict[int, Any] = {}  # cupy.cuda.MemoryPointer by address
        self._opened: list[int] = []  # of peers
        self._retired: list[tuple[Any, Any]] = []  # (event or None, what is to be kept until then)
        self.last_call: Any = None
        self.report: Any = None
        _reached_by_peers.add(self)
        self.captured = False
        self.control = self.allocate(device_control_block_dtype.itemsize)
        self._control_field("generation").set(np.array([world.generation], np.uint64))
        cupy.cuda.get_current_stream().synchronize()

    def allocate(self, nbytes: int) -> list[int]:
        """Collective: zeroed memory of every rank, as addresses on this rank's device. When it
        returns this rank's calls have ended."""
        import cupy

        if self._world.shares_gpu:
            # From the pool: freeing plain memory waits for the whole device, and the garbage
            # collector may do it while a kernel of another world waits for a peer.
            memory = cupy.cuda.alloc(nbytes)
        else:
            memory = cupy.cuda.MemoryPointer(cupy.cuda.Memory(nbytes), 0)
        cupy.cuda.runtime.memset(memory.ptr, 0, nbytes)
        cupy.cuda.runtime.deviceSynchronize()
        self._own[memory.ptr] = memory
        pointers = self._world.share_device_memory(memory.ptr)
        self._opened += [pointer for pointer in pointers if pointer != memory.ptr]
        return pointers

    def memory(self, pointer: int) -> Any:
        """This rank's own allocation at that address, as CuPy's; a view of it keeps it."""
        return self._own[pointer]

    def give_back(self, allocations: list[list[int]]) -> None:
        """Collective, when the calls of all ranks have ended: free what `allocate` returned. Where
        a rank has captured calls, or cannot let go of a peer's memory, all is kept."""
        rank, world, problem = self._world.rank, self._world, ""
        if any(world.allgather(self.captured, purpose="give back")):
            return
        try:
            for pointers in allocations:
                self._close([pointer for pointer in pointers if pointer != pointers[rank]])
        except Exception as error:  # of CUDA: the memory is only kept too long
            problem = str(error)
        if any(problems := world.allgather(problem, purpose="give back")):
            _log.warning("memory of outgrown layers is kept: %s", "; ".join(filter(None, problems)))
            return
        for pointers in allocations:
            del self._own[pointers[rank]]
        world.barrier()  # before a kernel waits for a peer: to free memory may wait for kernels

    def _close(self, pointers: list[int]) -> None:
        for pointer in pointers:
            self._world.close_device_memory(pointer)
            self._opened.remove(pointer)

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
        offset = device_control_block_dtype.fields["abort"][1] + 8 * self._world.rank  # type: ignore[index]
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
        import cupy

        if self.captured:  # replays are on streams that only their owner knows
            cupy.cuda.runtime.deviceSynchronize()
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

    def read_epochs(self, ranks: Sequence[int]) -> list[int]:
        """As far as the devices of those ranks have come; waits for no kernel."""
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
        offset = device_control_block_dtype.fields["held"][1]  # type: ignore[index]
        (self._control + offset).memset_async(0, 8, stream)
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
        self._close(list(self._opened))

    def close(self) -> None:
        """No peer in another process reaches this memory any more."""
        _reached_by_peers.discard(self)

    @property
    def _control(self) -> Any:
        return self.memory(self.control[self._world.rank])

    def _control_field(self, name: str) -> Any:
        import cupy

        cupy.cuda.get_current_stream().synchronize()
        offset = device_control_block_dtype.fields[name][1]  # type: ignore[index]
        return cupy.ndarray((1,), cupy.uint64, self._control + offset)
