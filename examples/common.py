"""What the examples share: the choice of the device, random weights, the check of the results."""

from __future__ import annotations

import argparse
import platform
import sys
from typing import Any

import numpy as np

import cometrt


def add_device_option(parser: argparse.ArgumentParser) -> None:
    """Add --device to a script's options."""
    help_text = "where the layer runs; auto: on a Hopper GPU if there is one"
    parser.add_argument(
        "--device", choices=["auto", "host", "cuda"], default="auto", help=help_text
    )


def pick_device(wanted: str) -> str:
    """The device, "host" or "cuda", that a value of --device means."""
    if wanted != "auto":
        return wanted
    try:
        import cupy

        return "cuda" if cupy.cuda.Device(0).compute_capability == "90" else "host"  # Hopper
    except Exception:  # no CuPy, no driver, no GPU
        return "host"


def to_device(world: cometrt.World, *arrays: np.ndarray) -> list[Any]:
    """NumPy arrays as the world's layers take them: as they are, or copied to the GPU."""
    if world.device == "host":
        return list(arrays)
    import cupy

    return [cupy.asarray(array) for array in arrays]


def to_host(*arrays: Any) -> list[np.ndarray]:
    """NumPy or CuPy arrays as NumPy arrays."""
    return [array if isinstance(array, np.ndarray) else array.get() for array in arrays]


def array_module(world: cometrt.World) -> Any:
    """NumPy or CuPy: the library of the arrays that the world's layers take."""
    if world.device == "host":
        return np
    import cupy

    return cupy


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


def random_weights(spec: cometrt.MoESpec, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Random w_up [E, 2I, H] and w_down [E, H, I] of the whole model, the same on every rank."""
    rng = np.random.default_rng(seed)
    rows = (2 if spec.gated else 1) * spec.intermediate
    w_up = rng.standard_normal((spec.num_experts, rows, spec.hidden), np.float32)
    w_down = rng.standard_normal((spec.num_experts, spec.hidden, spec.intermediate), np.float32)
    w_up /= np.sqrt(spec.hidden)
    w_down /= np.sqrt(spec.intermediate)
    return w_up.astype(spec.numpy_dtype), w_down.astype(spec.numpy_dtype)


def errors_against_reference(
    comm: Any,
    spec: cometrt.MoESpec,
    weights: tuple[np.ndarray, np.ndarray],
    inputs: tuple[np.ndarray, np.ndarray, np.ndarray],
    dy: np.ndarray,
    y: np.ndarray,
    grads: cometrt.Gradients,
) -> dict[str, float]:
    """Relative error ||found - expected|| / ||expected|| of each of this rank's results.

    Each rank runs the reference over its own tokens and all experts. Weight gradients are sums
    over the tokens of all ranks, so MPI adds them up before they are compared.

    Args:
        comm: the mpi4py communicator of the world.
        weights: w_up and w_down of the whole model, of `random_weights`.
        inputs: this rank's x [T, H], ids [T, K] and router weights [T, K].
        dy: what backward was given, [T, H].
        y, grads: what the layer returned on this rank.
    """
    from mpi4py import MPI

    x, ids, topk_weights = inputs
    model = (x, ids, topk_weights, *weights, spec.activation)
    expected = cometrt.reference.moe_backward(dy, *model)
    for gradient in (expected.w_up, expected.w_down):
        comm.Allreduce(MPI.IN_PLACE, gradient)
    dw_up, dw_down = cometrt.shard_weights(
        expected.w_up, expected.w_down, comm.Get_rank(), comm.Get_size(), spec
    )
    pairs = {
        "y": (y, cometrt.reference.moe_forward(*model)),
        "dx": (grads.x, expected.x),
        "dweight": (grads.topk_weights, expected.topk_weights),
        "dw_up": (grads.w_up, dw_up),
        "dw_down": (grads.w_down, dw_down),
    }
    return {name: _relative_error(*pair) for name, pair in pairs.items()}


def tolerance(spec: cometrt.MoESpec) -> float:
    """The largest relative error of a right result.

    bfloat16 rounds z, a, o, the partial sums and the results by up to 2^-9 each.
    """
    return 1e-2 if spec.dtype == "bfloat16" else 1e-5


def stop_if_wrong(comm: Any, errors: dict[str, float], spec: cometrt.MoESpec) -> None:
    """End the script on all ranks, with status 1, if a result of any rank is wrong."""
    wrong = comm.allreduce(not max(errors.values()) < tolerance(spec))
    if wrong:
        sys.exit(f"rank {comm.Get_rank()}: wrong results: {errors}")


def _relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    norm = np.linalg.norm(expected)
    distance = np.linalg.norm(found.astype(np.float64) - expected)
    return float(distance / norm) if norm else float(distance)
