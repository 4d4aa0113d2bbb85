"""The symmetric heap: what peers touch, and only that. One table serves every rank.

An array of a peer is its region plus an offset from the table. Several regions, because layers
of different shape share them: in "flags" a slot only ever holds epochs, whichever layer wrote
it, so that a stale value is always too small; what a peer may still read in the next epoch lies
in "routing0" or "routing1", by epoch parity; "data" holds everything else.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from cometrt.plan import PlanShape
from cometrt.world import World

REGIONS = ("data", "flags", "routing0", "routing1")
_ALIGNMENT = 256  # bytes: a bulk copy's and a cache line's


@dataclasses.dataclass(frozen=True)
class HeapEntry:
    region: str
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def heap_table(shape: PlanShape) -> dict[str, HeapEntry]:
    """name -> place of each array of one layer.

    x, dy: what peers pull, one copy each: who has all partials knows all pulls are done.
    ids, weights: by epoch parity, in the same place of either region; a peer's planner may read
        them for one epoch more, whatever layer that is of.
    staging: partial rows from contributors; dweight: from the shard that computed them.
    partials_ready: [contributor, block of tokens, chunk].
    """
    spec, size = shape.geometry.spec, shape.geometry.size
    tokens, dtype = (spec.max_tokens, spec.hidden), spec.numpy_dtype
    pairs = (spec.max_tokens, spec.topk)
    wanted = {
        "x": ("data", tokens, dtype),
        "dy": ("data", tokens, dtype),
        "staging": ("data", (shape.staging_rows, spec.hidden), dtype),
        "dweight": ("data", (spec.tp, *pairs), np.dtype(np.float32)),
        "partials_ready": (
            "flags",
            (size, shape.blocks_per_home, shape.config.num_n_chunks(spec.hidden)),
            np.dtype(np.int64),
        ),
    }
    for parity in (0, 1):
        wanted[f"ids{parity}"] = (f"routing{parity}", pairs, np.dtype(np.int32))
        wanted[f"weights{parity}"] = (f"routing{parity}", pairs, np.dtype(np.float32))
    table, end = {}, dict.fromkeys(REGIONS, 0)
    for name, (region, array_shape, array_dtype) in wanted.items():
        entry = table[name] = HeapEntry(region, end[region], array_shape, array_dtype)
        end[region] += -(-entry.nbytes // _ALIGNMENT) * _ALIGNMENT
    return table


def region_bytes(table: dict[str, HeapEntry]) -> dict[str, int]:
    """Bytes of each region that hold the arrays of a `heap_table`."""
    sizes = dict.fromkeys(REGIONS, 0)
    for entry in table.values():
        sizes[entry.region] = max(sizes[entry.region], entry.offset + entry.nbytes)
    return sizes


class SymmetricHeap:
    """One layer's arrays on every rank."""

    def __init__(self, world: World, shape: PlanShape) -> None:
        """Collective: the world's regions hold this layer's arrays until it is closed."""
        self._world = world
        self.table = heap_table(shape)
        world.regions.fit(self, region_bytes(self.table))

    def close(self) -> None:
        """This rank makes no more calls of the layer."""
        self._world.regions.forget(self)

    def rows_place(self, x_address: int) -> tuple[int, int]:
        """Addresses [begin, end) of what holds rows on this rank, x first, of the world's largest
        layer."""
        return x_address, x_address + self._world.regions.nbytes("data")

    def array(self, name: str, rank: int | None = None) -> np.ndarray:
        """A view of rank's array (default: this rank's)."""
        entry = self.table[name]
        memory = self._world.regions.of(entry.region, self._world.rank if rank is None else rank)
        part = memory[entry.offset : entry.offset + entry.nbytes]
        return part.view(entry.dtype).reshape(entry.shape)
