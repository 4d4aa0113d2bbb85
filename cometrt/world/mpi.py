"""`connect`: one process per rank on one host, under mpirun, with memory that the processes map.

Only `connect` uses MPI. Afterwards every wait goes through shared memory and has a deadline, and
MPI may be finalised before the world is closed.
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
    """The world of a rank that called `connect`."""

    def __init__(self, comm: Any, device: str, timeout_sec: float) -> None:
        """Collective. `comm` is used only to allocate the control blocks: an mpi4py communicator,
        or anything with its Get_rank, Get_size and allgather."""
        self._allgather_by_mpi = comm.allgather
        self._fence = threading.Lock()
        super().__init__(comm.Get_rank(), comm.Get_size(), device, timeout_sec)
        # Runs too if the process ends, or drops the world, without closing it.
        self._left = weakref.finalize(self, _signal_left, self.control_block, os.getpid())

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


def connect(comm: Any, device: str, *, timeout_sec: float = 30.0, gpu: int | None = None) -> World:
    """Collective: make the world of an mpi4py communicator, one rank per process, on one host.

    Args:
        comm: an mpi4py intracommunicator. It is duplicated, and not needed afterwards.
        device: "host" or "cuda".
        timeout_sec: the longest time that a single wait may last, in seconds.
        gpu: on "cuda" the index of this rank's GPU among those that the process sees. It becomes
            the current GPU. None: the process's rank on this host, as its launcher numbers it,
            modulo the number of GPUs.

    Raises:
        ValueError: for a wrong argument; if MPI is not initialised, has been finalised or lacks
            MPI_THREAD_MULTIPLE; if the ranks are on several hosts; or if the launcher and mpi4py
            use different MPI libraries. On all ranks, if any rank's `gpu` is invalid or no
            Hopper GPU, or its driver is too old.
        PeerTimeout: if a rank does not call it within timeout_sec. Do not pass this communicator
            to `connect` again.
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
    problem = use_gpu(device, gpu, MPI.COMM_WORLD)
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


# Environment variables with the number of processes: of MPI launchers, and of other launchers.
_MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "PALS_SIZE")
_OTHER_SIZES = ("SLURM_STEP_NUM_TASKS", "WORLD_SIZE")


def _check_launched_alone(library: str) -> None:
    """Raise a ValueError if the launcher started several processes and MPI sees only this one."""
    sizes = {name: os.environ.get(name, "") for name in (*_MPI_SIZES, *_OTHER_SIZES)}
    if "1" in [sizes[name] for name in _MPI_SIZES]:
        return  # an inner launcher started one process; other variables are of an outer launcher
    for name, size in sizes.items():
        if size.isdigit() and int(size) > 1:
            raise ValueError(
                f"comm must hold the ranks of the launcher: it started {size}, MPI.COMM_WORLD has "
                f"1; the launcher ({name}) and mpi4py use different MPI libraries. Use the mpirun "
                f"of mpi4py's library ({library}), or the srun --mpi=... that it supports"
            )


def use_gpu(device: str, gpu: Any, comm_world: Any) -> str:
    """Make the GPU the process's current one. Returns an error message, or ""."""
    try:
        if device == "host":
            if gpu is not None:
                raise ValueError(f"gpu must be None on device='host' (got {gpu!r})")
            return ""
        import cupy

        found = cupy.cuda.runtime.getDeviceCount()
        if gpu is None:
            gpu = rank_on_host(comm_world.Get_rank(), comm_world.Get_size()) % found
        gpu = check_int("gpu", gpu, minimum=0, maximum=found - 1)
        cupy.cuda.Device(gpu).use()
        check_gpu(gpu)
    except Exception as error:  # CuPy has error types of its own
        return str(error)
    return ""


# Environment variables of launchers: rank, number of ranks, rank on this host.
_LAUNCHED = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK"),
    ("PALS_RANKID", "PALS_SIZE", "PALS_LOCAL_RANKID"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
)


def rank_on_host(rank: int, size: int) -> int:
    """This process's rank on its host, from the launcher's environment variables.

    MPI could compute it only in a collective of MPI.COMM_WORLD. Variables of an outer launcher,
    which do not match rank and size in MPI.COMM_WORLD, are ignored. Without any variables it is
    `rank`, which is right on one host.
    """
    for names in _LAUNCHED:
        values = [os.environ.get(name, "") for name in names]
        if values[:2] == [str(rank), str(size)] and values[2].isdigit():
            return int(values[2])
    return rank


def _duplicate(comm: Any, timeout_sec: float) -> Any:
    """Duplicate the communicator, with a deadline.

    It completes only if all ranks take part. So the blocking MPI calls after it cannot hang on a
    missing rank.
    """
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
