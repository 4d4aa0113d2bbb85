"""`WantedTokens`: where tokens lie that cross on CUDA, if only wanted ones do."""

from __future__ import annotations

from typing import Any

from cometrt.nodes.slices import RailSlices


class WantedTokens:
    """Memory of `rail_choose` and `rail_pack` of one layer on one rank.

    Attributes:
        fields: of RailParams (kernels_cu/nodes/rail_params.cuh).
    """

    def __init__(self, slices: RailSlices, message_bytes: int, row_bytes: int) -> None:
        import cupy as cp

        self._cp, self._slices = cp, slices
        self._message_bytes, self._node_bytes = message_bytes, slices.crossing * row_bytes
        self._counts = cp.zeros(slices.nodes, cp.int32)
        self._outgoing = cp.zeros(slices.nodes * message_bytes, cp.uint8)
        self._rows = cp.ndarray((slices.nodes - 1) * self._node_bytes, cp.uint8)
        self.fields = {
            "counts": self._counts.data.ptr,
            "outgoing": self._outgoing.data.ptr,
            "crossing_rows": self._rows.data.ptr,
        }

    def new_slots(self) -> Any:
        """For `rail_choose`: an array of its own, since `saved` and plans keep it."""
        return self._cp.ndarray(self._slices.slots_shape, self._cp.int32)

    def message_to(self, node: int) -> tuple[int, int]:
        """(address, bytes) of this rank's message."""
        return self._outgoing.data.ptr + node * self._message_bytes, self._message_bytes

    def rows_to(self, node: int) -> int:
        """Address of the rows [C, H] for a node."""
        index = node - (node > self._slices.node)
        return int(self._rows.data.ptr) + index * self._node_bytes
