"""The layer within one of several nodes: its spec, and a rank's share of it.

A home there has tokens of all ranks of its rail. They may come one *row set* after the other: its
own rank's tokens are the first set, and parts of the others' are the next ones. Each set has plan
experts of its own, so that a GEMM can begin with the rows of one set while the next is on its way.
"""

from __future__ import annotations

import dataclasses

from cometrt.specs import Geometry, MoESpec

# A late part has so many times as many tokens as the last one, whose rows are multiplied after all
# have arrived. As kPartUnits in kernels_cu/nodes/rail_params.cuh.
PART_UNITS = 3


def last_part_tokens(crossing: int, parts: int) -> int:
    """Tokens of one other node in the last of so many late parts.

    Args:
        crossing: `MoESpec.crossing_tokens`.
    """
    return -(-crossing // (PART_UNITS * (parts - 1) + 1))


def slice_tokens(max_tokens: int, crossing: int, nodes: int, slices: int, parts: int = 0) -> int:
    """The most tokens of a home in one slice of a call over several nodes (`nodes.RailSlices`).

    Args:
        crossing: `MoESpec.crossing_tokens`.
        slices: `TileConfig.rail_slices`; 1 with parts.
        parts: `TileConfig.rail_parts`.
    """
    assert slices == 1 or parts == 0
    if parts > 0:
        return max_tokens + late_rows(crossing, nodes, parts)
    if slices == 1:
        return max_tokens + (nodes - 1) * crossing
    own, others = -(-max_tokens // 2), (nodes - 1) * -(-crossing // (slices - 2))
    return max(own, others)


def late_rows(crossing: int, nodes: int, parts: int) -> int:
    """Rows of a home in all late parts."""
    units = PART_UNITS * (parts - 1) + 1
    return (nodes - 1) * units * last_part_tokens(crossing, parts)


def spec_of_node(spec: MoESpec, nodes: int, slices: int = 1, parts: int = 0) -> MoESpec:
    """The spec of the layer within one of several nodes: it has the node's experts, and each rank
    is the home of the tokens of all ranks of its rail, or of one slice of them. In one slice a rank
    has as much capacity as in `spec`, however few of the tokens cross; smaller slices have at
    least the share of it that they have where all cross.

    Args:
        slices: `TileConfig.rail_slices`.
        parts: as for `slice_tokens`. With parts there are 1 + parts row sets, and as many plan
            experts for each expert of the node.

    Raises:
        ValueError: if a token may choose more experts than a node has.
    """
    if nodes == 1:
        return spec
    experts = spec.num_experts // nodes
    if spec.topk > experts:
        raise ValueError(
            f"topk must be at most the number of experts of a node, {spec.num_experts} / {nodes} = "
            f"{experts} (got {spec.topk})"
        )
    own, crossing = spec.max_tokens, spec.crossing_tokens
    tokens = slice_tokens(own, crossing, nodes, slices, parts)
    share = own / (own + (nodes - 1) * crossing)
    if slices > 1:  # rows of wanted tokens have more pairs than own ones: as much as if all crossed
        share = max(share, slice_tokens(own, own, nodes, slices) / (nodes * tokens))
    return dataclasses.replace(
        spec,
        num_experts=(1 + parts) * experts,
        max_tokens=tokens,
        capacity_factor=spec.capacity_factor * share,
        rail_tokens=None,
    )


def geometry_of_node(
    spec: MoESpec, rank: int, size: int, nodes: int, slices: int = 1, parts: int = 0
) -> Geometry:
    """A rank's share of the layer within its node. It has the weights that it has of the whole.

    Args:
        slices, parts: as for `spec_of_node`.
    """
    place, of_node = rank % (size // nodes), spec_of_node(spec, nodes, slices, parts)
    if nodes == 1 or parts == 0:
        return Geometry(of_node, place, size // nodes)
    crossing = spec.crossing_tokens
    part_rows = (nodes - 1) * PART_UNITS * last_part_tokens(crossing, parts)
    rows = part_rows, late_rows(crossing, nodes, parts)
    return Geometry(of_node, place, size // nodes, 1 + parts, *rows)
