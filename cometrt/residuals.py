"""What forward keeps for backward: `saved`, a flat tuple of arrays of fixed shape.

(meta [7] int64 on the host, read-only; epoch [1] int64; x; z [capacity, 2 * I_s]; the plan's
tables, on "cuda" in one array; w_up; w_down), where x is the gathered rows [capacity, H]
(save="rows") or this rank's tokens [max_tokens, H] (save="z" and "nothing"). z is left out with
save="nothing". Activations without a gate have z [capacity, I_s].

A layer over several nodes with rail_slices > 1 has epoch, x, z and tables once for each slice, one
slice behind the other. Where only wanted tokens cross, `slots` (`nodes.crossing`) comes behind.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import numpy as np

from cometrt.buffers import Buffers
from cometrt.plan import PlanShape
from cometrt.types import Arrays

_HINTS = {"shape": "; tune() may change it", "generation": "; reset() changes it"}
_INT64 = np.dtype(np.int64)
_REMEMBERED_USES = 65_536


class Origin(NamedTuple):
    """Which forward `saved` is of.

    Attributes:
        world, layer, shape, rank, generation: equal for all forwards of one layer on one rank,
            until world.reset() or tune().
    """

    world: int
    layer: int
    shape: int
    rank: int
    generation: int


_Z = 3  # place of z in `saved`, if it is there
SLOTS = "slots"  # name of that array, where only wanted tokens cross between nodes
META_SHAPE = (len(Origin._fields) + 2,)  # num_tokens and serial come behind


class Residuals(NamedTuple):
    """`saved` with names.

    Attributes:
        serial: number of the forward within its layer.
        num_tokens: T of the forward.
        epoch: of the forward.
        z: None with save="nothing".
        tables: the plan's.
        others: epoch, x, z and tables of the slices behind the first.
        slots: of `nodes.crossing`; None: all tokens cross.
    """

    serial: int
    num_tokens: int
    epoch: Any
    x: Any
    z: Any
    tables: tuple[Any, ...]
    w_up: Any
    w_down: Any
    others: tuple[dict[str, Any], ...] = ()
    slots: Any = None

    def of_slices(self) -> list[Residuals]:
        """Those of each slice."""
        first = self._replace(others=())
        return [first, *(first._replace(**kept) for kept in self.others)]

    def pack(self, origin: Origin) -> tuple[Any, ...]:
        """`saved`."""
        meta = np.array([*origin, self.num_tokens, self.serial], np.int64)
        meta.flags.writeable = False
        z = () if self.z is None else (self.z,)
        others = _flat(self.others) if self.others else ()
        slots = () if self.slots is None else (self.slots,)
        behind = (*others, *slots, self.w_up, self.w_down)
        return (meta, self.epoch, self.x, *z, *self.tables, *behind)

    @staticmethod
    def unpack(
        saved: Any, origin: Origin, specs: tuple[ArraySpec, ...], arrays: Arrays, slices: int = 1
    ) -> Residuals:
        """Args:
            specs: of `array_specs`.
            arrays: of the world's device.
            slices: of the layer's calls.

        Raises:
            ValueError: if it is not of that origin, or an array is not as its spec says.
        """
        numbers, kept = unpack_arrays(saved, "saved", "forward", origin, specs, arrays)
        w_down, w_up = kept.pop(), kept.pop()
        slots = kept.pop() if specs[-3].name == SLOTS else None
        (num_tokens, serial), (epoch, x, *tables) = numbers, kept
        saves_z = specs[_Z].name == "z"
        others: tuple[dict[str, Any], ...] = ()
        if slices > 1:
            (epoch, x, *tables), *behind = by_slice(kept, slices)
            others = tuple(_named(saves_z, *of) for of in behind)
        z = tables.pop(0) if saves_z else None
        of_all = w_up, w_down, others, slots
        return Residuals(serial, num_tokens, epoch, x, z, tuple(tables), *of_all)


def unpack_arrays(
    values: Any,
    name: str,
    source: str,
    origin: Origin,
    specs: tuple[ArraySpec, ...],
    arrays: Arrays,
) -> tuple[list[int], list[Any]]:
    """Take a tuple of arrays apart that a layer has returned, and check it.

    Args:
        name, source: of the argument, and of the method that returned it.
        specs: of all its arrays; first comes meta, which begins with the origin.

    Returns:
        (the numbers of meta behind the origin, the other arrays).

    Raises:
        ValueError: if it is not of that origin, or an array is not as its spec says.
    """
    length = len(specs)
    if not isinstance(values, (tuple, list)) or len(values) != length:
        what = f"{len(values)} items" if isinstance(values, (tuple, list)) else repr(type(values))
        call = "forward(training=True)" if source == "forward" else source
        raise ValueError(f"{name} must be the tuple of {length} that {call} returned (got {what})")
    meta = values[0]
    is_meta = isinstance(meta, np.ndarray) and meta.dtype == _INT64
    if not is_meta or meta.shape != specs[0].shape:
        raise ValueError(f"{name} must begin with {source}'s meta array (got something else)")
    numbers = meta.tolist()
    if numbers[: len(origin)] != [*origin]:
        _raise_wrong_origin(name, source, origin, numbers)
    check, checked = arrays.check, []
    for index in range(1, length):
        of = specs[index]
        checked.append(check(of.argument, values[index], of.shape, of.dtypes))
    return numbers[len(origin) :], checked


def _raise_wrong_origin(name: str, source: str, origin: Origin, numbers: list[int]) -> None:
    for field, expected, got in zip(Origin._fields, origin, numbers, strict=False):
        if got != expected:
            raise ValueError(
                f"{name} must come from this layer's {source} "
                f"({field} is {expected}, got {got}{_HINTS.get(field, '')})"
            )


def by_slice(arrays: list[Any], slices: int) -> list[list[Any]]:
    """Those of each slice. All slices have as many, one slice behind the other."""
    count = len(arrays) // slices
    return [arrays[begin : begin + count] for begin in range(0, len(arrays), count)]


def _flat(slices: tuple[dict[str, Any], ...]) -> list[Any]:
    """The arrays of `Residuals.others`, in their order in `saved`."""
    arrays: list[Any] = []
    for of in slices:
        z = () if of["z"] is None else (of["z"],)
        arrays += (of["epoch"], of["x"], *z, *of["tables"])
    return arrays


def _named(saves_z: bool, epoch: Any, x: Any, *tables: Any) -> dict[str, Any]:
    """A slice's arrays, as in `Residuals.others`."""
    z, tables = (tables[0], tables[1:]) if saves_z else (None, tables)
    return {"epoch": epoch, "x": x, "z": z, "tables": tables}


class Serials:
    """Numbers of a layer's forwards and plans. Those of ranks that have made the same calls since
    the last reset are equal."""

    def __init__(self) -> None:
        self._generation, self._last = 0, 0

    def next(self, generation: int) -> int:
        """The number of one more; `generation`: the world's."""
        if generation != self._generation:
            self._generation, self._last = generation, generation << 32
        self._last += 1
        return self._last


class Uses:
    """Remembers which residuals of a layer had their backward, of the latest 65,536."""

    def __init__(self) -> None:
        self._serials: dict[int, None] = {}

    def check(self, kept: Residuals) -> None:
        """Raises:
        ValueError: if they have had their backward.
        """
        if kept.serial in self._serials:
            raise ValueError("saved must be used for one backward only (it has had its backward)")

    def add(self, kept: Residuals) -> None:
        self._serials[kept.serial] = None
        if len(self._serials) > _REMEMBERED_USES:
            del self._serials[next(iter(self._serials))]


@dataclasses.dataclass(frozen=True)
class ArraySpec:
    """One array of `saved`, or of a plan.

    Attributes:
        name: what it holds.
        shape, dtype: the same in every call of the layer.
        index: in the tuple.
        owner: "saved" or "plan", the tuple.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    index: int
    owner: str = "saved"

    @functools.cached_property
    def argument(self) -> str:
        """What errors call it."""
        return f"{self.owner}[{self.index}] ({self.name})"

    @functools.cached_property
    def dtypes(self) -> tuple[np.dtype]:
        return (self.dtype,)


def array_specs(
    shape: PlanShape,
    buffers: Buffers,
    slices: int = 1,
    slots: tuple[int, int] | None = None,
) -> tuple[ArraySpec, ...]:
    """Specs of all arrays of `saved`: those of `buffers`, in its order, then the weights. All of
    `buffers` but meta comes again for each slice: "x of slice 1" behind "x".

    Args:
        slots: the shape of `Residuals.slots`, if it is there.
    """
    geometry, dtype = shape.geometry, shape.geometry.spec.numpy_dtype
    weights: Buffers = {
        "w_up": (geometry.w_up_shape, dtype),
        "w_down": (geometry.w_down_shape, dtype),
    }
    of_slice = {name: of for name, of in buffers.items() if name != "meta"}
    for index in range(1, slices):
        buffers = buffers | {f"{name} of slice {index}": of for name, of in of_slice.items()}
    if slots is not None:
        buffers = buffers | {SLOTS: (slots, np.dtype(np.int32))}
    named = (buffers | weights).items()
    return tuple(ArraySpec(name, *of, index) for index, (name, of) in enumerate(named))
