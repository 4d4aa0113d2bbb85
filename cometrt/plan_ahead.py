"""What `layer.plan` makes for forwards: `plan`, a flat tuple of arrays of fixed shape.

(meta [7] int64 on the host, read-only; epoch [1] int64; the plan's tables, on "cuda" in one array).
The tables are those of `saved`, where a planned forward's refer to its plan's. With rail_slices > 1
epoch and tables come once for each slice. `slots` comes last, as in `saved`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from cometrt.residuals import SLOTS, ArraySpec, Origin, by_slice, unpack_arrays
from cometrt.types import Arrays

_OF_FORWARD = ("x", "z", "w_up", "w_down")  # arrays of `saved` that no plan has


class PlanAhead(NamedTuple):
    """`plan` with names.

    Attributes:
        serial: number of the plan within its layer.
        num_tokens: T of the plan.
        epoch: of the plan; on "cuda" 0 if it failed.
        tables: the plan's.
        others: epoch and tables of the slices behind the first.
        slots: as in `Residuals`.
    """

    serial: int
    num_tokens: int
    epoch: Any
    tables: tuple[Any, ...]
    others: tuple[dict[str, Any], ...] = ()
    slots: Any = None

    def of_slices(self) -> list[PlanAhead]:
        """Those of each slice."""
        first = self._replace(others=())
        return [first, *(first._replace(**made) for made in self.others)]

    def pack(self, origin: Origin) -> tuple[Any, ...]:
        """`plan`."""
        meta = np.array([*origin, self.num_tokens, self.serial], np.int64)
        meta.flags.writeable = False
        others = (array for of in self.others for array in (of["epoch"], *of["tables"]))
        slots = () if self.slots is None else (self.slots,)
        return (meta, self.epoch, *self.tables, *others, *slots)

    @staticmethod
    def unpack(
        plan: Any, origin: Origin, specs: tuple[ArraySpec, ...], arrays: Arrays, slices: int = 1
    ) -> PlanAhead:
        """Args:
            specs: of `plan_specs`.
            arrays: of the world's device.
            slices: of the layer's calls.

        Raises:
            ValueError: if it is not of that origin, or an array is not as its spec says.
        """
        numbers, kept = unpack_arrays(plan, "plan", "plan", origin, specs, arrays)
        slots = kept.pop() if specs[-1].name == SLOTS else None
        (num_tokens, serial), (epoch, *tables) = numbers, kept
        others: tuple[dict[str, Any], ...] = ()
        if slices > 1:
            (epoch, *tables), *behind = by_slice(kept, slices)
            others = tuple({"epoch": of[0], "tables": tuple(of[1:])} for of in behind)
        return PlanAhead(serial, num_tokens, epoch, tuple(tables), others, slots)


def plan_specs(saved: tuple[ArraySpec, ...]) -> tuple[ArraySpec, ...]:
    """Specs of all arrays of `plan`, from those of `saved`."""
    meta, *others = (of for of in saved if of.name.partition(" ")[0] not in _OF_FORWARD)
    return tuple(
        dataclasses.replace(of, index=index, owner="plan")
        for index, of in enumerate((meta, *others))
    )
