"""What a layer over several nodes allocates besides that of one node."""

from __future__ import annotations

from cometrt.nodes.slices import RailSlices
from cometrt.plan import PlanShape


def rail_bytes(slices: RailSlices, shape: PlanShape, device: str, training: bool) -> int:
    """Bytes of the rows and tables that a call gathers, and of its partial results.

    Args:
        shape: within the node, whose homes have the tokens of a slice.
    """
    spec, geometry = shape.geometry.spec, shape.geometry
    row_bytes, several = spec.hidden * spec.numpy_dtype.itemsize, slices.overlaps
    rows, tables = slices.rows * row_bytes, slices.rows * spec.topk * 8
    if device == "cuda":
        more = 0
        if slices.wanted_only:  # crossing rows, outgoing messages, slots
            more = (slices.nodes - 1) * slices.crossing * row_bytes
            more += slices.nodes * (slices.crossing * spec.topk * 8 + slices.max_tokens * 4)
        return 2 * rows + 3 * tables + more
    # The rows of one slice and its results; x of all, which is in the heap if there is one slice.
    more = 2 * spec.max_tokens * (row_bytes + spec.topk * 8) + rows if several else 0
    if not training:
        return 2 * rows + 2 * tables + more
    weights = geometry.num_weights * spec.hidden
    weights *= geometry.up_columns + geometry.local_intermediate
    return 3 * rows + 2 * tables + more + 4 * weights  # weight gradients in float32
