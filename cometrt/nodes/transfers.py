"""What a rank sends and receives over its rail on CUDA: addresses and sizes of each transfer."""

from __future__ import annotations

from typing import NamedTuple

from cometrt.nodes.cuda_crossing import WantedTokens
from cometrt.nodes.slices import RailSlices


class Transfer(NamedTuple):
    """What NCCL moves at once: (node, address, bytes) of each message."""

    sends: list[tuple[int, int, int]]
    receives: list[tuple[int, int, int]]

    def __bool__(self) -> bool:
        return bool(self.sends)

    def __add__(self, other: tuple[object, ...]) -> Transfer:
        assert isinstance(other, Transfer)
        return Transfer(self.sends + other.sends, self.receives + other.receives)


class RailTransfers:
    """The transfers of one layer on one rank.

    Args:
        row_bytes: of a row of H columns.
        message_bytes: of a message with header, ids and weights.
        wanted: what crosses where only wanted tokens do.
    """

    def __init__(
        self, slices: RailSlices, row_bytes: int, message_bytes: int, wanted: WantedTokens | None
    ) -> None:
        self._slices, self._wanted = slices, wanted
        self._row_bytes, self._message_bytes = row_bytes, message_bytes
        self._others = [node for node in range(slices.nodes) if node != slices.node]

    def of_messages(self, messages: int) -> Transfer:
        """Messages, at the address of the array [N]; what goes out may be elsewhere."""
        if self._wanted is None:
            return self.of_array(messages, self._message_bytes)
        receives = self.of_array(messages, self._message_bytes).receives
        return Transfer([(node, *self._wanted.message_to(node)) for node in self._others], receives)

    def of_array(self, begin: int, nbytes: int) -> Transfer:
        """Of an array [N]: this rank's entry of so many bytes goes to all."""
        own = begin + self._slices.node * nbytes
        return Transfer(
            [(node, own, nbytes) for node in self._others],
            [(node, begin + node * nbytes, nbytes) for node in self._others],
        )

    def of_tokens(self, part: int, begin: int, all_rows: int) -> Transfer:
        """A part of the tokens, or of dy.

        Args:
            begin: address of this rank's rows, if all cross.
            all_rows: address of the rows of the rail [R, H].
        """
        sends, receives = [], []
        slots, nbytes = self._slices.slots_of(part), self._row_bytes
        for node in self._others if slots else ():
            of_node = self._wanted.rows_to(node) if self._wanted else begin
            sends.append((node, of_node + nbytes * slots[0], nbytes * len(slots)))
            row = self._slices.row_of(node, slots[0])
            receives.append((node, all_rows + nbytes * row, nbytes * len(slots)))
        return Transfer(sends, receives)

    def of_results(self, part: int, results: list[tuple[int, int, int]]) -> Transfer:
        """The partial results of a part.

        Args:
            results: (from, to, bytes of a row) of each array.
        """
        sends, receives = [], []
        slots = self._slices.slots_of(part)
        for node in self._others if slots else ():
            row = self._slices.row_of(node, slots[0])
            for begin, to, nbytes in results:
                sends.append((node, begin + nbytes * row, nbytes * len(slots)))
                receives.append((node, to + nbytes * row, nbytes * len(slots)))
        return Transfer(sends, receives)
