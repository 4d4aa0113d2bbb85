"""What forward keeps for backward: `saved`, a flat tuple of arrays of fixed shape.

(meta [7] int64 on the host, read-only; epoch [1] int64; x; z [capacity, 2 * I_s]; the plan's
tables, on "cuda" in one array; w_up; w_down), where x is the gathered rows [capacity, H]
(save="rows") or this rank's tokens [max_tokens, H] (save="z" and "nothing"). z is left out with
save="nothing". Activations without a gate have z [capacity, I_s].

A layer over several nodes with rail_slices > 1 has epoch, x, z and tables once for each slice, one
slice behind the other.
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


META_SHAPE = (len(Origin._fields) + 2,)  # num_tokens and serial come behind


@dataclasses.dataclass(frozen=True, eq=False)
class Residuals:
    """`saved` with names.

    Attributes:
        serial: number of the forward within its layer.
        num_tokens: T of the forward.
        epoch: of the forward.
        z: None with save="nothing".
        tables: the plan's.
        others: epoch, x, z and tables of the slices behind the first.
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

    def of_slices(self) -> list[Residuals]:
        """Those of each slice."""
        first = dataclasses.replace(self, others=())
        return [first, *(dataclasses.replace(first, **kept) for kept in self.others)]

    def pack(self, origin: Origin) -> tuple[Any, ...]:
        """`saved`."""
        meta = np.array([*origin, self.num_tokens, self.serial], np.int64)
        meta.flags.writeable = False
        arrays: list[Any] = []
        for of in self.of_slices():
            arrays += (of.epoch, of.x, *(() if of.z is None else (of.z,)), *of.tables)
        return (meta, *arrays, self.w_up, self.w_down)

    @staticmethod
    def unpack(
        saved: Any, origin: Origin, specs: tuple[ArraySpec, ...], arrays: Arrays
    ) -> Residuals:
        """Args:
            specs: of `array_specs`.
            arrays: of the world's device.

        Raises:
            ValueError: if it is not of that origin, or an array is not as its spec says.
        """
        numbers, kept = unpack_arrays(saved, "saved", "forward", origin, specs, arrays)
        weights = {name: kept.pop(name) for name in ("w_up", "w_down")}
        slices = [
            {"epoch": of.pop("epoch"), "x": of.pop("x"), "z": of.pop("z", None)}
            | {"tables": tuple(of.values())}
            for of in by_slice(kept)
        ]
        num_tokens, serial = numbers
        return Residuals(serial, num_tokens, **slices[0], **weights, others=tuple(slices[1:]))


def unpack_arrays(
    values: Any,
    name: str,
    source: str,
    origin: Origin,
    specs: tuple[ArraySpec, ...],
    arrays: Arrays,
) -> tuple[list[int], dict[str, Any]]:
    """Take a tuple of arrays apart that a layer has returned, and check it.

    Args:
        name, source: of the argument, and of the method that returned it.
        specs: of all its arrays; first comes meta, which begins with the origin.

    Returns:
        (the numbers of meta behind the origin, the other arrays by name).

    Raises:
        ValueError: if it is not of that origin, or an array is not as its spec says.
    """
    length = len(specs)
    if not isinstance(values, (tuple, list)) or len(values) != length:
        what = f"{len(values)} items" if isinstance(values, (tuple, list)) else repr(type(values))
        call = "forward(training=True)" if source == "forward" else source
        raise ValueError(f"{name} must be the tuple of {length} that {call} returned (got {what})")
    meta = values[0]
    is_meta = isinstance(meta, np.ndarray) and meta.dtype == np.int64
    if not is_meta or meta.shape != specs[0].shape:
        raise ValueError(f"{name} must begin with {source}'s meta array (got something else)")
    numbers = [int(number) for number in meta.tolist()]
    for field, expected, got in zip(Origin._fields, origin, numbers, strict=False):
        if got != expected:
            raise ValueError(
                f"{name} must come from this layer's {source} "
                f"({field} is {expected}, got {got}{_HINTS.get(field, '')})"
            )
    checked = {
        of.name: arrays.check(of.argument, array, of.shape, of.dtypes)
        for of, array in zip(specs[1:], values[1:], strict=True)
    }
    return numbers[len(origin) :], checked


def by_slice(arrays: dict[str, Any]) -> list[dict[str, Any]]:
    """Arrays named as in `array_specs`, with the names of one slice."""
    slices: list[dict[str, Any]] = []
    for name, array in arrays.items():
        if name.partition(" ")[0] == "epoch":  # each slice begins with it
            slices.append({})
        slices[-1][name.partition(" ")[0]] = array
    return slices


class Serials:
    """Numbers of a layer's forwards and plans. Those of ranks that have made the same calls since
    the last reset are equal."""

    def __init__(self) -> None:
        self._last = 0

    def next(self, generation: int) -> int:
        """The number of one more; `generation`: the world's."""
        self._last = max(self._last, generation << 32) + 1
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


def array_specs(shape: PlanShape, buffers: Buffers, slices: int = 1) -> tuple[ArraySpec, ...]:
    """Specs of all arrays of `saved`: those of `buffers`, in its order, then the weights. All of
    `buffers` but meta comes again for each slice: "x of slice 1" behind "x"."""
    geometry, dtype = shape.geometry, shape.geometry.spec.numpy_dtype
    weights: Buffers = {
        "w_up": (geometry.w_up_shape, dtype),
        "w_down": (geometry.w_down_shape, dtype),
    }
    of_slice = {name: of for name, of in buffers.items() if name != "meta"}
    for index in range(1, slices):
        buffers = buffers | {f"{name} of slice {index}": of for name, of in of_slice.items()}
    named = (buffers | weights).items()
    return tuple(ArraySpec(name, *of, index) for index, (name, of) in enumerate(named))
