"""One process a rank on one host, under mpirun: memory that the processes map.

MPI brings the ranks together in `connect`. Nothing of it is used afterwards: no wait is without a
deadline, and a world does not mind that MPI has been finalised.
"""

from __future__ import annotations

import functools
import os
import threading
import time
import weakref
from typing import Any

import numpy as np

from cometrt.errors import CometError, PeerTimeout
from cometrt.specs import check_int, check_timeout
from cometrt.world import ipc
from cometrt.world.base import World
from cometrt.world.failure import SLOW, WaitTarget
from cometrt.world.partitions import check_gpu
from cometrt.world.reset import end_device_waits
from cometrt.world.shared import share
from cometrt.world.threads import check_device


class MPIWorld(World):
    """A rank of `connect`."""

    def __init__(self, comm: Any, device: str, timeout_sec: float) -> None:
        """Collective; uses `comm`, whose ranks are all here, only for the control_blocks."""
        self._allgather_by_mpi = comm.allgather
        self._fence = threading.Lock()
        super().__init__(comm.Get_rank(), comm.Get_size(), device, timeout_sec)
        # Also when the script ends, or drops the world, without closing it.
        self._left = weakref.finalize(self, _tell_left, self.control_block, os.getpid())

    def _allocate(self, nbytes: int) -> list[np.ndarray]:
        if self._num_allocations == 0:  # the control blocks themselves: no mailbox yet
            return share(nbytes, self._allgather_by_mpi)
        return share(nbytes, functools.partial(self.allgather, purpose="shared memory"))

    def fence(self) -> None:
        # The first round's end is a release, the second's begin an acquire: nothing passes both.
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
            self._close_together(2)  # all ranks have let go of each other's memory
            self.gpu.close()

    def _leave_at_once(self) -> None:
        """Mappings go with the process or the world; memory on GPUs stays: a peer may have it."""

    def _close_together(self, step: int) -> None:
        """Until all ranks have come to that step of closing; at once if one of them will not."""
        self.control_block["closing"][0] = step

        def come(peer: int) -> int:
            closing = int(self.control_blocks[peer]["closing"][0])
            return step if closing < 0 else closing

        def look() -> str:
            if step == 1:  # peers' memory can still be read
                end_device_waits(self, "has closed the world")
            return ""

        for peer in range(self.size):
            wanted = WaitTarget("close", peer, step)
            here = functools.partial(come, peer)
            self.wait(here, wanted, even_if_stopped=True, absent=look)
            if self.control_blocks[peer]["closing"][0] < 0:
                failure = self._failure()
                first = failure.waiter if failure.kind == "raised" else peer
                raise failure.error(f"rank {first} left without closing: ")


def _tell_left(control_block: Any, process_id: int) -> None:
    if os.getpid() == process_id:
        control_block["closing"][0] = -1


def connect(comm: Any, device: str, *, timeout_sec: float = 30.0, gpu: int | None = None) -> World:
    """Collective: the world of an mpi4py communicator whose ranks are all on this host.

    Args:
        comm: an intracommunicator; it is duplicated.
        device: "host" or "cuda".
        timeout_sec: longest that any single wait may last.
        gpu: on "cuda" this rank's GPU, counted from 0 among those that the process sees; None: the
            number of the process among those that the launcher started on this host, whatever
            communicator `comm` is, modulo the GPUs that it sees. It becomes the current GPU.

    Raises:
        ValueError: for a wrong argument, an MPI that is not initialised or has been finalised,
            ranks on several hosts, a launcher that does not know the MPI that mpi4py uses, or an
            MPI without full thread support. On all ranks, for a wrong `gpu` on any of them, one
            that is no Hopper, or a driver that is too old.
        PeerTimeout: if a rank does not call it within timeout_sec. The communicator may not be
            used for `connect` again then.
    """
    timeout_sec = check_timeout(timeout_sec)
    check_device(device)
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise ValueError(f"connect needs mpi4py and an MPI library ({error})") from error
    if not MPI.Is_initialized() or MPI.Is_finalized():
        state = "has been finalised" if MPI.Is_initialized() else "is not initialised"
        raise ValueError(f"comm must be of a running MPI (got one of an MPI that {state})")
    if not isinstance(comm, MPI.Intracomm) or comm == MPI.COMM_NULL:
        raise ValueError(f"comm must be an mpi4py intracommunicator (got {comm!r})")
    if MPI.COMM_WORLD.Get_size() == 1:
        _check_launched_alone(MPI.Get_library_version().splitlines()[0])
    if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
        raise ValueError(
            "comm must come from an MPI initialised with MPI_THREAD_MULTIPLE "
            f"(got thread level {MPI.Query_thread()})"
        )
    problem = _use_gpu(device, gpu, MPI.COMM_WORLD)
    own = _duplicate(comm, timeout_sec)
    try:
        for rank, text in enumerate(own.allgather(problem)):
            if text:
                raise ValueError(f"{text} [rank {rank}]")
        node = own.Split_type(MPI.COMM_TYPE_SHARED)
        here = node.Get_size()
        node.Free()
        if here != own.Get_size():
            raise ValueError(f"comm must have all ranks on one host (got {here} of {own.size})")
        return MPIWorld(own, device, timeout_sec)
    finally:
        own.Free()


# Of launchers that start MPI, and of others.
_MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "PALS_SIZE")
_OTHER_SIZES = ("SLURM_STEP_NUM_TASKS", "WORLD_SIZE")


def _check_launched_alone(library: str) -> None:
    """In a process that MPI takes for the only one.

    Raises:
        ValueError: if its launcher has started several.
    """
    sizes = {name: os.environ.get(name, "") for name in (*_MPI_SIZES, *_OTHER_SIZES)}
    if "1" in [sizes[name] for name in _MPI_SIZES]:
        return  # the others are of a launcher around this one
    for name, size in sizes.items():
        if size.isdigit() and int(size) > 1:
            raise ValueError(
                f"comm must hold the ranks of the launcher: it started {size}, MPI.COMM_WORLD has "
                f"1; the launcher ({name}) and mpi4py use different MPI libraries. Use the mpirun "
                f"of mpi4py's ({library}), or srun --mpi=... as that wants it"
            )


def _use_gpu(device: str, gpu: Any, everybody: Any) -> str:
    """Make it this process's current one. Returns what is wrong with it, or nothing."""
    try:
        if device == "host":
            if gpu is not None:
                raise ValueError(f"gpu must be None on device='host' (got {gpu!r})")
            return ""
        import cupy

        found = cupy.cuda.runtime.getDeviceCount()
        if gpu is None:
            gpu = rank_on_host(everybody.Get_rank(), everybody.Get_size()) % found
        gpu = check_int("gpu", gpu, minimum=0, maximum=found - 1)
        cupy.cuda.Device(gpu).use()
        check_gpu(gpu)
    except Exception as error:  # CuPy raises types of its own
        return str(error)
    return ""


# What launchers tell a process: its rank, the number of ranks, its rank on this host.
_LAUNCHED = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK"),
    ("PALS_RANKID", "PALS_SIZE", "PALS_LOCAL_RANKID"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
)


def rank_on_host(rank: int, size: int) -> int:
    """Of the process with that rank in MPI.COMM_WORLD, as its launcher says: MPI itself could only
    tell if all of MPI.COMM_WORLD asked. Variables of a launcher that started something else, around
    this one, are passed over; without any, `rank`, which is right on one host."""
    for names in _LAUNCHED:
        values = [os.environ.get(name, "") for name in names]
        if values[:2] == [str(rank), str(size)] and values[2].isdigit():
            return int(values[2])
    return rank


def _duplicate(comm: Any, timeout_sec: float) -> Any:
    """A communicator of our own, within a deadline: it takes all ranks, so that the blocking
    calls after it find every rank there, also a late one after others gave up."""
    own, request = comm.Idup()
    deadline = time.monotonic() + timeout_sec
    while not request.Test():
        if time.monotonic() > deadline:
            raise PeerTimeout(
                f"rank {comm.Get_rank()} waited {timeout_sec:g} s in connect: "
                f"a rank of the communicator did not call it; {SLOW}"
            )
        time.sleep(1e-3)
    return own
