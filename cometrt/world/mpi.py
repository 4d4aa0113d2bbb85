"""One process a rank on one host, under mpirun: memory from MPI shared windows."""

from __future__ import annotations

import functools
import logging
import os
import time
from typing import Any

import numpy as np

from cometrt.errors import CometError, PeerTimeout
from cometrt.specs import check_int, check_timeout
from cometrt.world import ipc
from cometrt.world.base import World
from cometrt.world.failure import Wanted
from cometrt.world.partitions import check_gpu
from cometrt.world.threads import check_device

_log = logging.getLogger("cometrt")

_LAUNCHER_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


class MPIWorld(World):
    """A rank of `connect`."""

    def __init__(self, comm: Any, device: str, timeout_sec: float) -> None:
        self._comm = comm
        self._windows: list[Any] = []
        super().__init__(comm.Get_rank(), comm.Get_size(), device, timeout_sec)

    def _allocate(self, nbytes: int) -> list[np.ndarray]:
        from mpi4py import MPI

        window = MPI.Win.Allocate_shared(nbytes, 1, comm=self._comm)
        window.Lock_all(MPI.MODE_NOCHECK)  # lets Sync order accesses from now on
        self._windows.append(window)
        memories = []
        for rank in range(self.size):
            buffer: Any = window.Shared_query(rank)[0]
            memories.append(np.frombuffer(buffer, np.uint8, count=nbytes))
        memories[self.rank][:] = 0
        self.fence()
        self._comm.Barrier()  # every rank is in this call: nobody is missing
        return memories

    def fence(self) -> None:
        self._windows[0].Sync()

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

    def _free(self) -> None:
        self.board["closing"][0] = 1
        try:
            for peer in range(self.size):
                closing = self.boards[peer]["closing"]
                wanted = Wanted("close", peer, 1)
                self.wait(functools.partial(np.any, closing), wanted, even_if_stopped=True)
                if closing[0] < 0:
                    raise self._failure().error(f"rank {peer} left without closing: ")
        except BaseException as error:
            _log.warning("shared memory stays until the process ends: %s", error)
            raise
        if self.gpu:
            self.gpu.close_peers()
        for window in self._windows:
            window.Unlock_all()
            window.Free()
        self._windows.clear()  # a collective each: all ranks have let go of each other's memory
        if self.gpu:
            self.gpu.close()
        self._comm.Free()


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
        ValueError: for a wrong argument, ranks on several hosts, a launcher that belongs to
            another MPI than mpi4py uses, or an MPI without full thread support. On all ranks, for a
            wrong `gpu` on any of them, one that is no Hopper, or a driver that is too old.
        PeerTimeout: if a rank does not call it within timeout_sec. The communicator may not be
            used for `connect` again then.
    """
    timeout_sec = check_timeout(timeout_sec)
    check_device(device)
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise ValueError(f"connect needs mpi4py and an MPI library ({error})") from error
    if not isinstance(comm, MPI.Intracomm) or comm == MPI.COMM_NULL:
        raise ValueError(f"comm must be an mpi4py intracommunicator (got {comm!r})")
    for name in _LAUNCHER_SIZES:
        launched = os.environ.get(name, "1")
        if MPI.COMM_WORLD.Get_size() == 1 and launched.isdigit() and int(launched) > 1:
            raise ValueError(
                f"comm must hold the ranks of mpirun: it started {launched}, MPI.COMM_WORLD has 1; "
                f"mpirun and mpi4py use different MPI libraries "
                f"(mpi4py uses {MPI.Get_library_version().splitlines()[0]})"
            )
    if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
        raise ValueError(
            "comm must come from an MPI initialised with MPI_THREAD_MULTIPLE "
            f"(got thread level {MPI.Query_thread()})"
        )
    problem = _use_gpu(device, gpu, MPI.COMM_WORLD)
    own = _duplicate(comm, timeout_sec)
    for rank, text in enumerate(own.allgather(problem)):
        if text:
            own.Free()
            raise ValueError(f"{text} [rank {rank}]")
    node = own.Split_type(MPI.COMM_TYPE_SHARED)
    here = node.Get_size()
    node.Free()
    if here != own.Get_size():
        own.Free()
        raise ValueError(f"comm must have all ranks on one host (got {here} of {comm.Get_size()})")
    return MPIWorld(own, device, timeout_sec)


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
                f"a rank of the communicator did not call it"
            )
        time.sleep(1e-3)
    return own
