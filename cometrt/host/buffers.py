"""Tables of the arrays that a call on "host" allocates."""

from __future__ import annotations

import numpy as np

from cometrt.buffers import Buffers, plan_rows, total_bytes
from cometrt.plan import PlanShape
from cometrt.plan.tables import plan_table_shapes
from cometrt.residuals import META_SHAPE

_FLOAT32, _INT32, _INT64 = (np.dtype(kind) for kind in (np.float32, np.int32, np.int64))


def empty(buffers: Buffers) -> dict[str, np.ndarray]:
    """Uninitialised arrays, by name: only rows that the plan uses are ever touched."""
    return {name: np.empty(shape, dtype) for name, (shape, dtype) in buffers.items()}


def backward_rows(shape: PlanShape) -> Buffers:
    rows = plan_rows(shape)
    buffers = {
        "dy_rows": rows["x"],
        "dx_rows": rows["x"],
        "dz": rows["z"],
        "weighted_a": rows["a"],
        "dweight_rows": ((shape.capacity,), _FLOAT32),
    }
    if shape.geometry.spec.save != "rows":
        buffers["x_rows"] = rows["x"]
    return buffers


def wide_weights(shape: PlanShape) -> Buffers:
    """float32 copies of the weights, or float32 accumulators of their gradients."""
    geometry = shape.geometry
    return {"w_up": (geometry.w_up_shape, _FLOAT32), "w_down": (geometry.w_down_shape, _FLOAT32)}


def residuals(shape: PlanShape) -> Buffers:
    """The arrays of `saved`, without the weights."""
    spec, rows = shape.geometry.spec, plan_rows(shape)
    buffers: Buffers = {"meta": (META_SHAPE, _INT64), "epoch": ((1,), _INT64)}
    buffers["x"] = ((spec.max_tokens, spec.hidden), spec.numpy_dtype)
    if spec.save == "rows":
        buffers["x"] = rows["x"]
    if spec.save != "nothing":
        buffers["z"] = rows["z"]
    return buffers | _tables(shape)


def scratch_bytes(shape: PlanShape, _mode: str, training: bool) -> int:
    """Bytes that the largest call allocates besides its arguments, results and `saved`."""
    forward, weights = plan_rows(shape), total_bytes(wide_weights(shape))
    if not training:
        return total_bytes(forward | _tables(shape)) + weights
    kept = {"rows": "xz", "z": "z", "nothing": ""}[shape.geometry.spec.save]
    scratch = {name: buffer for name, buffer in forward.items() if name not in kept}
    backward = total_bytes(backward_rows(shape)) + 2 * weights
    return max(total_bytes(scratch) + weights, backward)


def _tables(shape: PlanShape) -> Buffers:
    return {
        name: (table, _FLOAT32 if name == "row_weight" else _INT32)
        for name, table in plan_table_shapes(shape).items()
    }
