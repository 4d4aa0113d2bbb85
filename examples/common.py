"""What the examples share besides cometrt.cli.inputs: --device, streams, sums over ranks."""

from __future__ import annotations

import argparse
import contextlib
import platform
from typing import Any

import numpy as np

import cometrt
from cometrt.cli.inputs import to_host


def add_device_option(parser: argparse.ArgumentParser) -> None:
    """Add --device to a script's options."""
    help_text = "where the layer runs; auto: on a Hopper GPU if there is one"
    parser.add_argument(
        "--device", choices=["auto", "host", "cuda"], default="auto", help=help_text
    )


def array_module(world: cometrt.World) -> Any:
    """NumPy or CuPy: the library of the arrays that the world's layers take."""
    if world.device == "host":
        return np
    import cupy

    return cupy


def own_stream(world: cometrt.World) -> contextlib.AbstractContextManager[Any]:
    """A CuPy stream, current within the context. CUDA captures no graph of its default stream.
    None on the host."""
    if world.device == "host":
        return contextlib.nullcontext()
    return array_module(world).cuda.Stream(non_blocking=True)


class GradientSum:
    """Adds arrays over the ranks, in place.

    By NCCL where every rank has a GPU of its own: queued on the current stream, without a wait. By
    MPI on the host, and where ranks share a GPU, which NCCL refuses. Make it before the first call
    of a layer, because NCCL loads kernels.
    """

    def __init__(self, comm: Any, world: cometrt.World) -> None:
        self._comm, self._nccl = comm, None
        if world.device == "host" or comm.Get_size() == 1:
            return
        import cupy
        from cupy.cuda import nccl

        gpus = comm.allgather((platform.node(), cupy.cuda.Device().pci_bus_id))
        if nccl.available and len(set(gpus)) == len(gpus):
            unique = comm.bcast(nccl.get_unique_id() if comm.Get_rank() == 0 else None)
            self._nccl = nccl.NcclCommunicator(comm.Get_size(), unique, comm.Get_rank())
            self([cupy.zeros(1, np.float32)])

    def __call__(self, arrays: list[Any]) -> None:
        """Of float32, C-contiguous."""
        if self._nccl is not None:
            import cupy
            from cupy.cuda import nccl

            stream = cupy.cuda.get_current_stream().ptr
            for array in arrays:
                place, count = array.data.ptr, array.size
                self._nccl.allReduce(place, place, count, nccl.NCCL_FLOAT32, nccl.NCCL_SUM, stream)
        elif self._comm.Get_size() > 1:
            from mpi4py import MPI

            for array, total in zip(arrays, to_host(*arrays), strict=True):
                self._comm.Allreduce(MPI.IN_PLACE, total)
                if total is not array:
                    array.set(total)
