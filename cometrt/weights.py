"""From a model's full weights to one rank's part of them."""

from __future__ import annotations

import numpy as np

from cometrt.specs import Geometry, MoESpec, check_int


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
        ValueError: for shapes that do not fit the spec, or a rank outside [0, size).
    """
    if not isinstance(spec, MoESpec):
        raise ValueError(f"spec must be a cometrt.MoESpec (got {type(spec)!r})")
    size = check_int("size", size, minimum=1)
    rank = check_int("rank", rank, minimum=0, maximum=size - 1)
    geometry = Geometry(spec, rank, size)
    parts = 2 if spec.gated else 1
    for name, array, shape in (
        ("w_up_all", w_up_all, (spec.num_experts, parts * spec.intermediate, spec.hidden)),
        ("w_down_all", w_down_all, (spec.num_experts, spec.hidden, spec.intermediate)),
    ):
        if np.shape(array) != shape:
            raise ValueError(f"{name} must have shape {shape} (got {np.shape(array)})")
    experts = slice(
        geometry.group * geometry.local_experts, (geometry.group + 1) * geometry.local_experts
    )
    columns = slice(
        geometry.shard * geometry.local_intermediate,
        (geometry.shard + 1) * geometry.local_intermediate,
    )
    split = np.asarray(w_up_all)[experts].reshape(
        geometry.local_experts, parts, spec.intermediate, spec.hidden
    )
    w_up = np.ascontiguousarray(split[:, :, columns]).reshape(geometry.w_up_shape)
    return w_up, np.ascontiguousarray(np.asarray(w_down_all)[experts][:, :, columns])
