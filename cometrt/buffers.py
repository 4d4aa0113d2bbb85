"""Tables of arrays, name -> (shape, dtype): what executors allocate and `MoESpec.memory` counts."""

from __future__ import annotations

import math

import numpy as np

from cometrt.plan import PlanShape

Buffers = dict[str, tuple[tuple[int, ...], np.dtype]]  # (shape, dtype)


def plan_rows(shape: PlanShape) -> Buffers:
    """The forward's row arrays x, z, a and o: [capacity, columns], padding rows included."""
    geometry = shape.geometry
    hidden, dtype = geometry.spec.hidden, geometry.spec.numpy_dtype
    columns = {"x": hidden, "z": geometry.up_columns, "a": geometry.local_intermediate, "o": hidden}
    return {name: ((shape.capacity, width), dtype) for name, width in columns.items()}


def total_bytes(buffers: Buffers, unit: int = 1) -> int:
    """Sum of the sizes, each rounded up to a multiple of `unit` bytes."""
    sizes = (math.prod(shape) * dtype.itemsize for shape, dtype in buffers.values())
    return sum(-(-size // unit) * unit for size in sizes)
