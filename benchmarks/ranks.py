"""The ranks of a benchmark: threads of this process, or processes under mpirun."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import cupy as cp

import cometrt

_UNDER_MPI = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")


class Threads:
    """Ranks are threads of this process."""

    rank = 0

    def __init__(self, ranks: int, link: str | None = None) -> None:
        self.size, self.link = ranks, link

    def run(self, fn: Any) -> Any:
        return cometrt.spawn(fn, self.size, "cuda", link=self.link, timeout_sec=20)[0]

    def devices(self) -> Iterable[int]:
        return range(cp.cuda.runtime.getDeviceCount())

    def barrier(self) -> None:
        pass

    def of_first(self, value: Any) -> Any:
        """Rank 0's value, on all ranks."""
        return value


class Processes:
    """Ranks are processes under mpirun."""

    def __init__(self) -> None:
        from mpi4py import MPI

        self._comm = MPI.COMM_WORLD
        self.rank, self.size, self.link = self._comm.rank, self._comm.size, None

    def run(self, fn: Any) -> Any:
        with cometrt.connect(self._comm, "cuda", timeout_sec=20) as world:
            return fn(world)

    def devices(self) -> Iterable[int]:
        return [cp.cuda.Device().id]

    def barrier(self) -> None:
        self._comm.Barrier()

    def of_first(self, value: Any) -> Any:
        """Rank 0's value, on all ranks."""
        return self._comm.bcast(value)


def is_under_mpi() -> bool:
    return any(int(os.environ.get(name, 1)) > 1 for name in _UNDER_MPI)
