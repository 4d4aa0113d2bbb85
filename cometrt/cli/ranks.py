"""How a command runs on ranks: under mpirun on its processes, otherwise on threads of its own."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable
from typing import TypeVar, cast

import cometrt

Result = TypeVar("Result")

HOST_RANKS = 4  # threads, where nothing says how many
TIMEOUT_SEC = 60.0  # of a wait: the reference and the compiler take their time
LAST_WORDS_SEC = 0.5  # a launcher may drop what it has not read yet when ranks abort
RANKS = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK", "PALS_RANKID")
SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "PALS_SIZE")


def is_under_mpi() -> bool:
    """Whether a launcher of MPI started several processes."""
    return any(os.environ.get(name, "").isdigit() and int(os.environ[name]) > 1 for name in SIZES)


def is_first() -> bool:
    """Whether this process is rank 0 of its launcher, or was started by itself."""
    return not is_under_mpi() or "0" in [os.environ.get(name) for name in RANKS]


class Threads:
    """Ranks are threads of this process.

    Args:
        ranks: how many.
        link: that is emulated between virtual ranks; None: none.
    """

    rank = 0

    def __init__(self, ranks: int, link: str | None = None) -> None:
        self.size, self.link = ranks, link

    def run(
        self, fn: Callable[[cometrt.World], Result], device: str, timeout_sec: float = TIMEOUT_SEC
    ) -> Result:
        """fn(world) on all ranks; the result of rank 0."""
        return cometrt.spawn(fn, self.size, device, link=self.link, timeout_sec=timeout_sec)[0]

    def devices(self) -> Iterable[int]:
        """Numbers of the GPUs on which ranks of this process run."""
        import cupy

        return range(cupy.cuda.runtime.getDeviceCount())

    def barrier(self) -> None:
        pass

    def of_first(self, value: Result) -> Result:
        """Rank 0's value, on all ranks."""
        return value


class Processes:
    """Ranks are processes under mpirun."""

    def __init__(self) -> None:
        from mpi4py import MPI

        self._comm = MPI.COMM_WORLD
        self.rank, self.size, self.link = self._comm.rank, self._comm.size, None

    def run(
        self, fn: Callable[[cometrt.World], Result], device: str, timeout_sec: float = TIMEOUT_SEC
    ) -> Result:
        """fn(world) on all ranks; the result of this rank."""
        with cometrt.connect(self._comm, device, timeout_sec=timeout_sec) as world:
            return fn(world)

    def devices(self) -> Iterable[int]:
        """The number of this rank's GPU."""
        import cupy

        return [cupy.cuda.Device().id]

    def barrier(self) -> None:
        self._comm.Barrier()

    def of_first(self, value: Result) -> Result:
        """Rank 0's value, on all ranks."""
        return cast(Result, self._comm.bcast(value))

    def abort(self) -> None:
        """End all processes, with status 1."""
        sys.stdout.flush()
        sys.stderr.flush()
        time.sleep(LAST_WORDS_SEC)
        self._comm.Abort(1)


def all_ranks(wanted: int | None, device: str) -> Threads | Processes:
    """The ranks of a command.

    Args:
        wanted: number of threads; None: as many as there are GPUs, or four on the host or on a
            single GPU. Under mpirun it must be None or the number of processes.
        device: "host" or "cuda".

    Raises:
        ValueError: if `wanted` is not the number of processes.
    """
    if is_under_mpi():
        found = Processes()
        if wanted not in (None, found.size):
            raise ValueError(
                f"--ranks must be the processes of mpirun, {found.size} (got {wanted})"
            )
        return found
    if wanted is None:
        gpus = gpu_count() if device == "cuda" else 0
        wanted = gpus if gpus > 1 else HOST_RANKS
    return Threads(wanted)


def gpu_count() -> int:
    """GPUs that CuPy sees; 0 without CuPy or a driver."""
    try:
        import cupy

        return int(cupy.cuda.runtime.getDeviceCount())
    except Exception:  # CuPy has error types of its own
        return 0
