"""The symmetric heap: the arrays that peers read or write. One table serves every rank.

A peer's array lies at the peer's region plus the offset from the table. Layers of different shapes
share the regions, so arrays are grouped by what may remain in them from an earlier layer:

flags: holds epochs only, whichever layer wrote them, so a stale value is always too small.
routing0, routing1: ids and weights by epoch parity. A peer may read them for one more epoch.
data: everything else.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from cometrt.plan import PlanShape
from cometrt.world import World

REGIONS = ("data", "flags", "routing0", "routing1")
_ALIGNMENT = 256  # bytes: a multiple of a cache line and of what a bulk copy needs


@dataclasses.dataclass(frozen=True)
class HeapEntry:
    """Where one array lies: its region, the offset there in bytes, its shape and dtype."""

    region: str
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def heap_table(shape: PlanShape) -> dict[str, HeapEntry]:
    """Name -> HeapEntry of each heap array of one layer.

    x, dy [max_tokens, H]: peers pull them. One copy suffices: a home that has all partial rows
        knows that every pull from it has completed.
    ids0, ids1, weights0, weights1 [max_tokens, K]: by epoch parity, at the same offset in either
        region. A peer's planner may read them for one more epoch, also one of another layer.
    staging [staging_rows, H]: partial rows that contributors push.
    dweight [tp, max_tokens, K]: gradients of the router weights, by the shard that computed them.
    partials_ready [W, token blocks, N-chunks]: epoch, by contributor. A call may have fewer
        N-chunks, and so other strides.
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
            (size, shape.blocks_per_home, max_n_chunks(shape)),
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


def max_n_chunks(shape: PlanShape) -> int:
    """N-chunks of a forward or of a backward, whichever has more."""
    hidden = shape.geometry.spec.hidden
    return max(of.config.num_n_chunks(hidden) for of in (shape, shape.of_backward()))


def region_bytes(table: dict[str, HeapEntry]) -> dict[str, int]:
    """Region -> bytes that the arrays of a `heap_table` take there."""
    sizes = dict.fromkeys(REGIONS, 0)
    for entry in table.values():
        sizes[entry.region] = max(sizes[entry.region], entry.offset + entry.nbytes)
    return sizes


class SymmetricHeap:
    """The heap arrays of one layer, on every rank."""

    def __init__(self, world: World, shape: PlanShape) -> None:
        """Collective: size the world's regions so that they hold this layer's arrays."""
        self._world = world
        self.table = heap_table(shape)
        world.regions.fit(self, region_bytes(self.table))

    def close(self) -> None:
        """Release the layer's claim on the regions: this rank makes no more calls of the layer."""
        self._world.regions.forget(self)

    def rows_place(self, x_address: int) -> tuple[int, int]:
        """Addresses [begin, end) of this rank's region "data", which begins with x."""
        return x_address, x_address + self._world.regions.nbytes("data")

    def array(self, name: str, rank: int | None = None) -> np.ndarray:
        """A NumPy view of the array of `rank`; None: of this rank."""
        entry = self.table[name]
        memory = self._world.regions.of(entry.region, self._world.rank if rank is None else rank)
        part = memory[entry.offset : entry.offset + entry.nbytes]
        return part.view(entry.dtype).reshape(entry.shape)
