"""`RailSlices`: how a call over several nodes is cut into calls of the node's layer.

With one slice, rows of the rank on node i are those from i * max_tokens on. With more, this rank's
own rows come first; behind them are the parts of other nodes' tokens, one after the other. A part
has the same tokens of each other node, in the order of nodes:

    own tokens [max_tokens] | part 0: [N - 1, part_tokens] | part 1: [N - 1, part_tokens] | ...

The calls are: the first half of the own rows, each part, the second half. A part arrives while the
slices before it are computed, and its results return while those behind it are.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from cometrt.specs import slice_tokens


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
    """

    nodes: int
    node: int
    max_tokens: int
    count: int = 1

    @property
    def parts(self) -> int:
        """Number of transfers in which the tokens of other nodes arrive."""
        return max(1, self.count - 2)

    @property
    def part_tokens(self) -> int:
        """The most tokens of one other node in a part."""
        return -(-self.max_tokens // self.parts)

    @property
    def rows(self) -> int:
        """Of all slices. Some in the last part may belong to no token."""
        if self.count == 1:
            return self.nodes * self.max_tokens
        return self.max_tokens + self.parts * (self.nodes - 1) * self.part_tokens

    @property
    def slice_tokens(self) -> int:
        """Rows of the largest slice."""
        return slice_tokens(self.max_tokens, self.nodes, self.count)

    def calls(self) -> list[RailSlice]:
        """In their order."""
        if self.count == 1:
            return [RailSlice(0, self.rows, 0)]
        own, length = self.max_tokens, (self.nodes - 1) * self.part_tokens
        begins = [own + part * length for part in range(self.parts)]
        others = [RailSlice(begin, begin + length, part) for part, begin in enumerate(begins)]
        half = -(-own // 2)
        return [RailSlice(0, half, None), *others, RailSlice(half, own, None)]

    def tokens_of(self, part: int) -> range:
        """The tokens of each other node that a part has."""
        begin = min(part * self.part_tokens, self.max_tokens)
        return range(begin, min(begin + self.part_tokens, self.max_tokens))

    def row_of(self, node: int, token: int = 0) -> int:
        """The row of a token. As row_of in kernels_cu/nodes/rail_params.cuh."""
        if self.count == 1:
            return node * self.max_tokens + token
        if node == self.node:
            return token
        part, offset = divmod(token, self.part_tokens)
        slot = part * (self.nodes - 1) + node - (node > self.node)
        return self.max_tokens + slot * self.part_tokens + offset

    def token_of(self, row: int) -> tuple[int, int]:
        """(node, token) of a row."""
        if self.count == 1:
            return divmod(row, self.max_tokens)
        if row < self.max_tokens:
            return self.node, row
        slot, offset = divmod(row - self.max_tokens, self.part_tokens)
        part, other = divmod(slot, self.nodes - 1)
        return other + (other >= self.node), part * self.part_tokens + offset
