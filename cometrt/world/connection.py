"""`connect`: the world of an mpi4py communicator, and what it asks of MPI and of the launcher."""

from __future__ import annotations

import os
import time
from typing import Any

from cometrt.errors import PeerTimeout
from cometrt.specs import check_int, check_timeout
from cometrt.world.base import World
from cometrt.world.failure import SLOW
from cometrt.world.mpi import MPIWorld
from cometrt.world.nodes import (
    RANKS_PER_NODE,
    NodesWorld,
    first_on_host,
    nccl_problem,
    ranks_per_node,
)
from cometrt.world.partitions import check_gpu
from cometrt.world.threads import check_device


def connect(comm: Any, device: str, *, timeout_sec: float = 30.0, gpu: int | None = None) -> World:
    """Collective: make the world of an mpi4py communicator, one rank per process.

    Ranks that share memory are a node. Each of N nodes has the same number G of ranks, which follow
    each other: rank = node * G + place. The environment variable COMETRT_RANKS_PER_NODE=G cuts a
    host into nodes of G ranks. On several nodes the world needs MPI until it is closed, and on
    "cuda" NCCL.

    Args:
        comm: an mpi4py intracommunicator. It is duplicated, and not needed afterwards.
        device: "host" or "cuda".
        timeout_sec: the longest time that a single wait may last, in seconds.
        gpu: on "cuda" the index of this rank's GPU among those that the process sees. It becomes
            the current GPU. None: the process's rank on this host, as its launcher numbers it,
            modulo the number of GPUs.

    Raises:
        ValueError: for a wrong argument; if MPI is not initialised, has been finalised or lacks
            MPI_THREAD_MULTIPLE; if nodes have different numbers of ranks; or if the launcher and
            mpi4py use different MPI libraries. On all ranks, if any rank's `gpu` is invalid or no
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
    own, kept = _duplicate(comm, timeout_sec), False
    try:
        _raise_first(own.allgather(problem))
        cut = os.environ.get(RANKS_PER_NODE, "")
        ranks = own.allgather((first_on_host(own), cut))
        size = ranks_per_node([first for first, _ in ranks], [cut for _, cut in ranks])
        if size == own.Get_size():
            return MPIWorld(own, device, timeout_sec)
        _raise_first(own.allgather(nccl_problem() if device == "cuda" else ""))
        kept = True
    finally:
        if not kept:
            own.Free()
    return _connect_nodes(own, device, timeout_sec, size)


def _raise_first(problems: list[str]) -> None:
    for rank, text in enumerate(problems):
        if text:
            raise ValueError(f"{text} [rank {rank}]")


def _connect_nodes(comm: Any, device: str, timeout_sec: float, ranks_per_node: int) -> World:
    node_comm = comm.Split(comm.Get_rank() // ranks_per_node)
    try:
        return NodesWorld(comm, node_comm, device, timeout_sec, ranks_per_node)
    finally:
        node_comm.Free()


# Environment variables with the number of processes: of MPI launchers, and of other launchers.
_MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "PALS_SIZE")
_OTHER_SIZES = ("SLURM_STEP_NUM_TASKS", "WORLD_SIZE")


def launched() -> tuple[str, int] | None:
    """The environment variable by which a launcher says that it started several processes, and
    their number. None: no launcher says so."""
    sizes = {name: os.environ.get(name, "") for name in (*_MPI_SIZES, *_OTHER_SIZES)}
    if "1" in [sizes[name] for name in _MPI_SIZES]:
        return None  # an inner launcher started one process; other variables are of an outer one
    for name, size in sizes.items():
        if size.isdigit() and int(size) > 1:
            return name, int(size)
    return None


def _check_launched_alone(library: str) -> None:
    """Raise a ValueError if the launcher started several processes and MPI sees only this one."""
    found = launched()
    if found is not None:
        name, size = found
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
