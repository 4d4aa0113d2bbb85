"""`RailSlices`: how a call over several nodes is cut into calls of the node's layer.

A home has rows for max_tokens tokens of its own rank, and for `crossing` tokens of each other rank
of its rail. Where only wanted tokens cross, a row of these is a *slot* of `nodes.crossing`; else it
is that token's, and slots are tokens.

With one slice, ranks' rows are in the order of nodes. With more, this rank's own rows come first;
behind them are the parts of other nodes' tokens, one after the other. A part has the same slots of
each other node, in the order of nodes:

    own tokens [max_tokens] | part 0: [N - 1, part_tokens] | part 1: [N - 1, part_tokens] | ...

The calls are: the first half of the own rows, each part, the second half. A part arrives while the
slices before it are computed, and its results return while those behind it are.

With late parts (`TileConfig.rail_parts`) there is one call, which begins when the ids of all tokens
have arrived, but not their rows. Results of the last part to arrive are complete first:

    part 0: [N - 1, part_tokens] | ... | part P - 1: [N - 1, last] | own tokens [max_tokens]

The last part is smaller than the others (`node_specs.PART_UNITS`): what follows its arrival is not
hidden.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from cometrt.node_specs import PART_UNITS, last_part_tokens, late_rows, slice_tokens
from cometrt.specs import MoESpec


class RailSlice(NamedTuple):
    """One call of the node's layer.

    Attributes:
        begin, end: its rows.
        part: which part of other nodes' tokens it has; None: none.
    """

    begin: int
    end: int
    part: int | None


@dataclasses.dataclass(frozen=True)
class RailSlices:
    """Of one layer on one rank.

    Attributes:
        nodes, node: N, and this rank's.
        max_tokens: of the layer.
        count: number of calls of the node's layer in a call: `TileConfig.rail_slices`.
        crossing: `MoESpec.crossing_tokens`.
        late_parts: P, parts that arrive during the call: `TileConfig.rail_parts`. 0: none.
    """

    nodes: int
    node: int
    max_tokens: int
    count: int
    crossing: int
    late_parts: int = 0

    @staticmethod
    def of(spec: MoESpec, nodes: int, node: int, count: int = 1, parts: int = 0) -> RailSlices:
        """Of a layer of that spec."""
        return RailSlices(nodes, node, spec.max_tokens, count, spec.crossing_tokens, parts)

    @property
    def overlaps(self) -> bool:
        """Whether tokens cross while the node computes."""
        return self.count > 1 or self.late_parts > 0

    @property
    def parts(self) -> int:
        """Number of transfers in which the tokens of other nodes arrive."""
        return self.late_parts or max(1, self.count - 2)

    @property
    def part_tokens(self) -> int:
        """The most tokens of one other node in a part."""
        if self.late_parts:
            return PART_UNITS * last_part_tokens(self.crossing, self.late_parts)
        return -(-self.crossing // self.parts)

    def tokens_of(self, part: int) -> int:
        """Rows of one other node in a part."""
        if self.late_parts and part == self.late_parts - 1:
            return self.part_tokens // PART_UNITS
        return self.part_tokens

    @property
    def rows(self) -> int:
        """Of all slices. Some in the last part may belong to no token."""
        if not self.overlaps:
            return self.slice_tokens
        if self.late_parts:
            return self.first_own_row + self.max_tokens
        return self.max_tokens + self.parts * self.part_rows

    @property
    def slice_tokens(self) -> int:
        """Rows of the largest slice."""
        return slice_tokens(self.max_tokens, self.crossing, self.nodes, self.count, self.late_parts)

    @property
    def part_rows(self) -> int:
        """Rows of a part but the last."""
        return (self.nodes - 1) * self.part_tokens

    @property
    def first_own_row(self) -> int:
        """With late parts, the rows of other nodes' tokens: own ones come behind them."""
        parts = self.late_parts
        return late_rows(self.crossing, self.nodes, parts) if parts else 0

    @property
    def wanted_only(self) -> bool:
        """Whether only wanted tokens cross (`nodes.crossing`)."""
        return self.nodes > 1 and self.crossing < self.max_tokens

    @property
    def slots_shape(self) -> tuple[int, int] | None:
        """[N, max_tokens], of `nodes.crossing`; None: all tokens cross."""
        return (self.nodes, self.max_tokens) if self.wanted_only else None

    def calls(self) -> list[RailSlice]:
        """In their order."""
        if self.count == 1:
            return [RailSlice(0, self.rows, 0)]
        own, length = self.max_tokens, self.part_rows
        begins = [own + part * length for part in range(self.parts)]
        others = [RailSlice(begin, begin + length, part) for part, begin in enumerate(begins)]
        half = -(-own // 2)
        return [RailSlice(0, half, None), *others, RailSlice(half, own, None)]

    def slots_of(self, part: int) -> range:
        """The slots of each other node that a part has."""
        begin = min(part * self.part_tokens, self.crossing)
        return range(begin, min(begin + self.part_tokens, self.crossing))

    def row_of(self, node: int, slot: int = 0) -> int:
        """The row of a slot; of this node, of a token. As row_of in
        kernels_cu/nodes/rail_params.cuh."""
        if not self.overlaps:
            more = self.max_tokens - self.crossing if node > self.node else 0
            return node * self.crossing + more + slot
        if node == self.node:
            return self.first_own_row + slot
        part, offset = divmod(slot, self.part_tokens)
        other = (node - (node > self.node)) * self.tokens_of(part) + offset
        first = 0 if self.late_parts else self.max_tokens
        return first + part * self.part_rows + other

    def slot_of(self, row: int) -> tuple[int, int]:
        """(node, slot) of a row; of this node, (node, token)."""
        if not self.overlaps:
            node = sum(self.row_of(node) <= row for node in range(1, self.nodes))
            return node, row - self.row_of(node)
        if self.first_own_row <= row < self.first_own_row + self.max_tokens:
            return self.node, row - self.first_own_row
        row -= 0 if self.late_parts else self.max_tokens
        part = min(row // self.part_rows, self.parts - 1)
        other, offset = divmod(row - part * self.part_rows, self.tokens_of(part))
        return other + (other >= self.node), part * self.part_tokens + offset
