"""What a layer over several nodes allocates besides that of one node."""

from __future__ import annotations

from cometrt.plan import PlanShape


def rail_bytes(shape: PlanShape, device: str, training: bool) -> int:
    """Bytes of the rows and tables that a call gathers, and of its partial results.

    Args:
        shape: within the node, whose homes have the tokens of all ranks of a rail.
    """
    spec, geometry = shape.geometry.spec, shape.geometry
    rows = spec.max_tokens * spec.hidden * spec.numpy_dtype.itemsize
    tables = spec.max_tokens * spec.topk * 8
    if device == "cuda":
        return 2 * rows + 3 * tables
    if not training:
        return 2 * rows + 2 * tables
    weights = geometry.local_experts * spec.hidden
    weights *= geometry.up_columns + geometry.local_intermediate
    return 3 * rows + 2 * tables + 4 * weights  # weight gradients in float32
