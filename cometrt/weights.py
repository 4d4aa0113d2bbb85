"""From a model's full weights to one rank's part of them, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cometrt.specs import Geometry, MoESpec, check_int, check_unmasked


def shard_weights(
    w_up_all: np.ndarray, w_down_all: np.ndarray, rank: int, size: int, spec: MoESpec
) -> tuple[np.ndarray, np.ndarray]:
    """(w_up, w_down) of one rank, contiguous copies; works on weights and their gradients.

    Args:
        w_up_all: [E, 2I, H], the I gate rows first, then the I up rows; [E, I, H] where the
            activation is not gated.
        w_down_all: [E, H, I].
        rank, size: of the world.
        spec: of the layer; its dtype is not looked at.

    Returns:
        w_up [E_l, 2 * I_s, H] and w_down [E_l, H, I_s] of the inputs' dtypes.

    Raises:
        ValueError: for shapes that do not fit the spec, a masked array, or a rank outside
            [0, size).
    """
    _check_spec(spec)
    size = check_int("size", size, minimum=1)
    rank = check_int("rank", rank, minimum=0, maximum=size - 1)
    geometry = Geometry(spec, rank, size)
    parts = 2 if spec.gated else 1
    for name, array, shape in (
        ("w_up_all", w_up_all, (spec.num_experts, parts * spec.intermediate, spec.hidden)),
        ("w_down_all", w_down_all, (spec.num_experts, spec.hidden, spec.intermediate)),
    ):
        check_unmasked(name, array)
        if np.shape(array) != shape:
            raise ValueError(f"{name} must have shape {shape} (got {np.shape(array)})")
    experts, columns = _held(geometry)
    split = np.asarray(w_up_all)[experts].reshape(
        geometry.local_experts, parts, spec.intermediate, spec.hidden
    )
    w_up = np.array(split[:, :, columns], order="C").reshape(geometry.w_up_shape)
    return w_up, np.array(np.asarray(w_down_all)[experts, :, columns], order="C")


def unshard_weights(
    shards: Sequence[tuple[np.ndarray, np.ndarray]], spec: MoESpec
) -> tuple[np.ndarray, np.ndarray]:
    """(w_up_all, w_down_all) of the model, new arrays: the inverse of `shard_weights`.

    For a checkpoint, or to shard again for another EP x TP. Works on weights and their gradients.

    Args:
        shards: a list of (w_up, w_down), NumPy arrays, one a rank in the order of ranks.
        spec: of the layer that they are shards of; its dtype is not looked at.

    Returns:
        w_up_all [E, 2I, H], the I gate rows first ([E, I, H] where the activation is not gated),
        and w_down_all [E, H, I], of the shards' dtypes.

    Raises:
        ValueError: for a number of shards or shapes that do not fit the spec, dtypes that differ
            between ranks, and what is not a numpy.ndarray, or a masked one.
    """
    _check_spec(spec)
    if not isinstance(shards, (list, tuple)) or not shards:
        raise ValueError(
            f"shards must be a list of one pair (w_up, w_down) per rank (got {shards!r:.60})"
        )
    geometries = [Geometry(spec, rank, len(shards)) for rank in range(len(shards))]
    for geometry, pair in zip(geometries, shards, strict=True):
        _check_pair(geometry, pair, shards[0])
    parts, (first_up, first_down) = 2 if spec.gated else 1, shards[0]
    w_up_all = np.empty(
        (spec.num_experts, parts, spec.intermediate, spec.hidden), dtype=first_up.dtype
    )
    w_down_all = np.empty(
        (spec.num_experts, spec.hidden, spec.intermediate), dtype=first_down.dtype
    )
    for geometry, (w_up, w_down) in zip(geometries, shards, strict=True):
        experts, columns = _held(geometry)
        w_up_all[experts, :, columns] = w_up.reshape(
            geometry.local_experts, parts, geometry.local_intermediate, spec.hidden
        )
        w_down_all[experts, :, columns] = w_down
    return w_up_all.reshape(spec.num_experts, parts * spec.intermediate, spec.hidden), w_down_all


def _held(geometry: Geometry) -> tuple[slice, slice]:
    """The experts of the model that the rank has a part of, and which of their I columns."""
    first_expert = geometry.group * geometry.local_experts
    first_column = geometry.shard * geometry.local_intermediate
    return (
        slice(first_expert, first_expert + geometry.local_experts),
        slice(first_column, first_column + geometry.local_intermediate),
    )


def _check_spec(spec: Any) -> None:
    if not isinstance(spec, MoESpec):
        raise ValueError(f"spec must be a cometrt.MoESpec (got {type(spec)!r})")


def _check_pair(geometry: Geometry, pair: Any, first: Any) -> None:
    """`pair` against the rank's geometry and the dtypes of rank 0's pair, checked before."""
    rank, is_list = geometry.rank, isinstance(pair, (list, tuple))
    if not is_list or len(pair) != 2:
        got = f"{len(pair)} items" if is_list else repr(type(pair))
        raise ValueError(f"shards[{rank}] must be a pair (w_up, w_down) (got {got})")
    shapes = geometry.w_up_shape, geometry.w_down_shape
    for index, (array, shape) in enumerate(zip(pair, shapes, strict=True)):
        name = f"{('w_up', 'w_down')[index]} of rank {rank}"
        if not isinstance(array, np.ndarray):
            raise ValueError(f"{name} must be a numpy.ndarray (got {type(array)!r})")
        check_unmasked(name, array)
        if array.shape != shape:
            raise ValueError(f"{name} must have shape {shape} (got {array.shape})")
        if array.dtype != first[index].dtype:
            raise ValueError(
                f"{name} must have dtype {first[index].dtype}, as that of rank 0 has "
                f"(got {array.dtype})"
            )
