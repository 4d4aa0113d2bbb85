"""Shard a model's weights over the ranks, and put the shards together again."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cometrt.specs import Geometry, MoESpec, check_int, check_unmasked


def shard_weights(
    w_up_all: np.ndarray, w_down_all: np.ndarray, rank: int, size: int, spec: MoESpec
) -> tuple[np.ndarray, np.ndarray]:
    """Copy one rank's shard out of a model's weights, or out of their gradients.

    Args:
        w_up_all: [E, 2I, H] with the I gate rows first, then the I up rows; [E, I, H] if the
            activation is not gated.
        w_down_all: [E, H, I].
        rank, size: of the world.
        spec: of the layer; its dtype is ignored.

    Returns:
        (w_up [E_l, 2 * I_s, H], w_down [E_l, H, I_s]): C-contiguous copies in the inputs' dtypes.

    Raises:
        ValueError: if a shape does not match the spec, an array is masked, or rank is outside
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
        geometry.num_weights, parts, spec.intermediate, spec.hidden
    )
    w_up = np.array(split[:, :, columns], order="C").reshape(geometry.w_up_shape)
    return w_up, np.array(np.asarray(w_down_all)[experts, :, columns], order="C")


def unshard_weights(
    shards: Sequence[tuple[np.ndarray, np.ndarray]], spec: MoESpec
) -> tuple[np.ndarray, np.ndarray]:
    """Put the shards of all ranks together: the inverse of `shard_weights`.

    Use it to write a checkpoint, or to shard again for another EP x TP. It works for weights and
    for their gradients.

    Args:
        shards: list of (w_up, w_down), one NumPy pair per rank in rank order.
        spec: of the sharded layer; its dtype is ignored.

    Returns:
        (w_up_all, w_down_all): new arrays in the shards' dtypes. w_up_all is [E, 2I, H] with the
        I gate rows first, or [E, I, H] if the activation is not gated. w_down_all is [E, H, I].

    Raises:
        ValueError: if the number of shards or a shape does not match the spec, dtypes differ
            between ranks, or an array is masked or no numpy.ndarray.
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
            geometry.num_weights, parts, geometry.local_intermediate, spec.hidden
        )
        w_down_all[experts, :, columns] = w_down
    return w_up_all.reshape(spec.num_experts, parts * spec.intermediate, spec.hidden), w_down_all


def _held(geometry: Geometry) -> tuple[slice, slice]:
    """The rank's range of experts, and its range of their I columns."""
    first_expert = geometry.group * geometry.num_weights
    first_column = geometry.shard * geometry.local_intermediate
    return (
        slice(first_expert, first_expert + geometry.num_weights),
        slice(first_column, first_column + geometry.local_intermediate),
    )


def _check_spec(spec: object) -> None:
    if not isinstance(spec, MoESpec):
        raise ValueError(f"spec must be a cometrt.MoESpec (got {type(spec)!r})")


def _check_pair(geometry: Geometry, pair: object, first: tuple[np.ndarray, np.ndarray]) -> None:
    """Check a rank's pair against its geometry and the dtypes of rank 0's pair."""
    rank = geometry.rank
    if not isinstance(pair, (list, tuple)) or len(pair) != 2:
        got = f"{len(pair)} items" if isinstance(pair, (list, tuple)) else repr(type(pair))
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
                f"{name} must have rank 0's dtype {first[index].dtype} (got {array.dtype})"
            )
