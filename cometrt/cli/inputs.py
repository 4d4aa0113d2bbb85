"""Inputs of layers, and the check of their results: for the command line and the examples."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

import cometrt
from cometrt.bench.workloads import relative_error


def pick_device(wanted: str) -> str:
    """The device, "host" or "cuda", that a value of --device means. "auto": a Hopper GPU if there
    is one."""
    if wanted != "auto":
        return wanted
    try:
        import cupy

        return "cuda" if cupy.cuda.Device(0).compute_capability == "90" else "host"
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


def standard_library(num_bytes: int) -> np.ndarray:
    """The first bytes of the standard library's source files, in the order of their names."""
    text = b""
    for path in sorted(Path(os.__file__).parent.glob("*.py")):
        text += path.read_bytes()
        if len(text) >= num_bytes:
            break
    return np.frombuffer(text[:num_bytes], np.uint8)


def random_weights(spec: cometrt.MoESpec, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Random w_up [E, 2I, H] and w_down [E, H, I] of the whole model, the same on every rank."""
    rng = np.random.default_rng(seed)
    rows = (2 if spec.gated else 1) * spec.intermediate
    w_up = rng.standard_normal((spec.num_experts, rows, spec.hidden), np.float32)
    w_down = rng.standard_normal((spec.num_experts, spec.hidden, spec.intermediate), np.float32)
    w_up /= np.sqrt(spec.hidden)
    w_down /= np.sqrt(spec.intermediate)
    return w_up.astype(spec.numpy_dtype), w_down.astype(spec.numpy_dtype)


def random_inputs(layer: cometrt.MoELayer, num_tokens: int) -> tuple[tuple[Any, ...], Any]:
    """Random arguments of `layer.forward` and dy, on the layer's device. Experts are chosen evenly.

    Weights are drawn on the device, and only this rank's: those of a whole model may not fit.
    """
    spec, geometry = layer.spec, layer.geometry
    rng = np.random.default_rng(100 + layer.world.rank)
    if layer.world.device == "cuda":
        import cupy

        from cometrt.bench.workloads import device_normal

        cupy.random.seed(layer.world.rank)
        normal = device_normal
    else:

        def normal(shape: tuple[int, ...], scale: float = 1.0) -> Any:
            values = rng.standard_normal(shape, np.float32)
            values *= scale
            return values.astype(spec.numpy_dtype)

    logits = rng.standard_normal((num_tokens, spec.num_experts))
    routing = cometrt.router.softmax_topk(logits, spec.topk)
    rows = (num_tokens, spec.hidden)
    w_up = normal(geometry.w_up_shape, spec.hidden**-0.5)
    w_down = normal(geometry.w_down_shape, spec.intermediate**-0.5)
    return (normal(rows), *to_device(layer.world, *routing), w_up, w_down), normal(rows)


def errors_against_reference(
    world: cometrt.World,
    spec: cometrt.MoESpec,
    weights: tuple[np.ndarray, np.ndarray],
    inputs: tuple[np.ndarray, np.ndarray, np.ndarray],
    dy: np.ndarray,
    y: np.ndarray,
    grads: cometrt.Gradients,
) -> dict[str, float]:
    """Collective: relative error ||found - expected|| / ||expected|| of this rank's results.

    The reference runs over this rank's tokens and all experts, and over all tokens and this rank's
    experts, whose weight gradients the rank has.

    Args:
        weights: w_up and w_down of the whole model, of `random_weights`.
        inputs: this rank's x [T, H], ids [T, K] and router weights [T, K].
        dy: what backward was given, [T, H].
        y, grads: what the layer returned on this rank.
    """
    model = (*inputs, *weights, spec.activation)
    expected = cometrt.reference.moe_backward(dy, *model)
    everywhere = world.allgather((dy, *inputs), purpose="reference")
    all_dy, all_x, all_ids, all_weights = map(np.concatenate, zip(*everywhere, strict=True))
    w_up, w_down = cometrt.shard_weights(*weights, world.rank, world.size, spec)
    local = all_ids - world.rank // spec.tp * len(w_up)
    local = np.where((local >= 0) & (local < len(w_up)), local, -1)
    of_experts = cometrt.reference.moe_backward(
        all_dy, all_x, local, all_weights, w_up, w_down, spec.activation
    )
    pairs = {
        "y": (y, cometrt.reference.moe_forward(*model)),
        "dx": (grads.x, expected.x),
        "dweight": (grads.topk_weights, expected.topk_weights),
        "dw_up": (grads.w_up, of_experts.w_up),
        "dw_down": (grads.w_down, of_experts.w_down),
    }
    return {name: relative_error(*pair) for name, pair in pairs.items()}


def check_errors(world: cometrt.World, errors: dict[str, float], spec: cometrt.MoESpec) -> None:
    """Collective.

    Raises:
        CometError: on all ranks, if a result of any rank is wrong.
    """
    for rank, found in enumerate(world.allgather(errors, purpose="check")):
        if not max(found.values()) < tolerance(spec):
            raise cometrt.CometError(f"rank {rank}: wrong results: {found}")


def tolerance(spec: cometrt.MoESpec) -> float:
    """The largest relative error of a right result.

    bfloat16 rounds z, a, o, the partial sums and the results by up to 2^-9 each.
    """
    return 1e-2 if spec.dtype == "bfloat16" else 1e-5
