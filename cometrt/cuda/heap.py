"""A layer's arrays in the symmetric heap, as CuPy arrays."""

from __future__ import annotations

from typing import Any

from cometrt.heap import HeapEntry, SymmetricHeap


class DeviceHeap(SymmetricHeap):
    """One layer's arrays on every rank. This rank's are CuPy arrays."""

    def own(self, name: str) -> Any:
        """This rank's array; a view of it keeps its memory."""
        import cupy as cp

        entry, gpu = self.table[name], self._world.gpu
        assert gpu is not None
        memory = gpu.memory(self._world.regions.of(entry.region, self._world.rank))
        return cp.ndarray(entry.shape, entry.dtype, memory + entry.offset)

    _place, _place_version = (0, 0), -1

    def place(self) -> tuple[int, int]:
        """Addresses [begin, end) of this rank's heap of rows, which begins with x."""
        version = self._world.regions.version
        if self._place_version != version:
            self._place = self.rows_place(self._address(self.table["x"]))
            self._place_version = version
        return self._place

    def out_of_heap(self, array: Any, name: str) -> Any:
        """The array, or a copy if it lies in the heap at another place than its own: `publish`
        copies into the heap in parallel, and would read what it has overwritten."""
        begin, end = self.place()
        address = array.data.ptr
        if address + array.nbytes <= begin or address >= end:
            return array
        return array if address == self._address(self.table[name]) else array.copy()

    def _address(self, entry: HeapEntry) -> int:
        own: int = self._world.regions.of(entry.region, self._world.rank)
        return own + entry.offset
