"""`MPIWorld`: one process per rank on one host, with memory that the processes map.

Only its construction uses MPI. Afterwards every wait goes through shared memory and has a deadline,
and MPI may be finalised before the world is closed.
"""

from __future__ import annotations

import functools
import os
import threading
import weakref
from typing import Any

import numpy as np

from cometrt.errors import CometError
from cometrt.world import ipc
from cometrt.world.base import World
from cometrt.world.failure import WaitTarget
from cometrt.world.reset import end_device_waits
from cometrt.world.shared import share


class MPIWorld(World):
    """The world of a rank that called `connect`."""

    def __init__(self, comm: Any, device: str, timeout_sec: float) -> None:
        """Collective. `comm` is used only to allocate the control blocks: an mpi4py communicator,
        or anything with its Get_rank, Get_size and allgather."""
        self._allgather_by_mpi = comm.allgather
        self._fence = threading.Lock()
        super().__init__(comm.Get_rank(), comm.Get_size(), device, timeout_sec)
        # Runs too if the process ends, or drops the world, without closing it.
        self._left: weakref.finalize = weakref.finalize(
            self, _signal_left, self.control_block, os.getpid()
        )

    def allocate_host(self, nbytes: int) -> list[np.ndarray]:
        if self._num_allocations == 0:  # collectives need the control blocks, so use MPI for them
            return share(nbytes, self._allgather_by_mpi)
        return share(nbytes, functools.partial(self.allgather, purpose="shared memory"))

    def fence(self) -> None:
        # Unlocking is a release, locking again is an acquire: no access moves across both.
        for _ in range(2):
            with self._fence:
                pass

    def share_device_memory(self, pointer: int) -> list[int]:
        handles = self.allgather(ipc.handle_of(pointer), purpose="device memory")
        pointers = [pointer] * self.size
        for rank in set(range(self.size)) - {self.rank}:
            try:
                pointers[rank] = ipc.open_handle(handles[rank])
            except CometError as error:
                raise CometError(
                    f"rank {self.rank} cannot reach the memory of rank {rank}: every rank must see "
                    f"all GPUs (CUDA_VISIBLE_DEVICES), and they must be peers ({error})"
                ) from error
        return pointers

    def close_device_memory(self, pointer: int) -> None:
        ipc.close_handle(pointer)

    def _leave(self) -> None:
        self._left.detach()
        self._close_together(1)
        if self.gpu:
            self.gpu.close_peers()
            self._close_together(2)  # all ranks have closed each other's memory
            self.gpu.close()

    def _leave_at_once(self) -> None:
        """Do nothing: host mappings end with the world, and a peer may still use GPU memory."""

    def _close_together(self, step: int) -> None:
        """Wait until all ranks have reached that step of closing, or one has left."""
        self.control_block["closing"][0] = step

        def step_of(peer: int) -> int:
            closing = int(self.control_blocks[peer]["closing"][0])
            return step if closing < 0 else closing

        def gone() -> str:
            if step == 1:  # the epochs on peers' devices can still be read
                end_device_waits(self, "has closed the world")
            return ""

        for peer in range(self.size):
            target = WaitTarget("close", peer, step)
            read = functools.partial(step_of, peer)
            self.wait(read, target, even_if_stopped=True, gone=gone)
            if self.control_blocks[peer]["closing"][0] < 0:
                failure = self._failure()
                first = failure.waiter if failure.kind == "raised" else peer
                raise failure.error(f"rank {first} left without closing: ")


def _signal_left(control_block: np.void, process_id: int) -> None:
    if os.getpid() == process_id:  # not in a forked child
        control_block["closing"][0] = -1
