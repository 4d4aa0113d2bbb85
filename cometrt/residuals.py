"""What forward keeps for backward: a flat tuple of arrays of fixed shape, and the weights.

(meta [7] int64 on the host, epoch [1] int64, x, z [capacity, 2 * I_s], the plan's tables (on
"cuda" in one array), w_up, w_down), where x is the gathered rows [capacity, H] (save="rows") or
this rank's tokens [max_tokens, H] (save="z").
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from cometrt.plan import PlanShape

_META = ("world", "layer", "shape", "rank", "num_tokens", "generation", "used")
META_SHAPE = (len(_META),)


@dataclasses.dataclass(frozen=True, eq=False)
class Residuals:
    """The tuple with names; `meta` is shared with it, so that a use is seen by both."""

    meta: np.ndarray
    epoch: Any  # of the forward
    x: Any
    z: Any
    tables: tuple[Any, ...]  # of the plan
    w_up: Any
    w_down: Any

    @staticmethod
    def pack(
        *,
        shape: PlanShape,
        layer: int,
        num_tokens: int,
        world: int,
        generation: int,
        epoch: Any,
        x: Any,
        z: Any,
        tables: tuple[Any, ...],
        w_up: Any,
        w_down: Any,
    ) -> tuple[Any, ...]:
        rank = shape.geometry.rank
        values = [world, layer, shape.digest, rank, num_tokens, generation, 0]
        meta = np.array(values, np.int64)
        return (meta, epoch, x, z, *tables, w_up, w_down)

    @staticmethod
    def unpack(
        saved: Any, *, shape: PlanShape, layer: int, world: int, num_tables: int, generation: int
    ) -> Residuals:
        """Check that it is this layer's, on this rank, and not used yet.

        Raises:
            ValueError: otherwise.
        """
        length = 4 + num_tables + 2
        if not isinstance(saved, (tuple, list)) or len(saved) != length:
            what = f"{len(saved)} items" if isinstance(saved, (tuple, list)) else repr(type(saved))
            raise ValueError(
                f"saved must be the tuple of {length} that forward(training=True) returned "
                f"(got {what})"
            )
        meta = saved[0]
        if not isinstance(meta, np.ndarray) or meta.shape != META_SHAPE:
            raise ValueError("saved must begin with forward's meta array (got something else)")
        found = dict(zip(_META, (int(value) for value in meta), strict=True))
        for name, expected in (
            ("world", world),
            ("layer", layer),
            ("shape", shape.digest),
            ("rank", shape.geometry.rank),
            ("generation", generation),
        ):
            if found[name] != expected:
                changed_by = {
                    "shape": "; tune() may change it",
                    "generation": "; reset() changes it",
                }
                hint = changed_by.get(name, "")
                raise ValueError(
                    f"saved must come from this layer's forward "
                    f"({name} is {expected}, got {found[name]}{hint})"
                )
        if found["used"]:
            raise ValueError("saved must be used for one backward only (it has had its backward)")
        epoch, x, z = saved[1:4]
        return Residuals(meta, epoch, x, z, tuple(saved[4:-2]), saved[-2], saved[-1])

    @property
    def num_tokens(self) -> int:
        return int(self.meta[_META.index("num_tokens")])

    def mark_used(self) -> None:
        self.meta[_META.index("used")] = 1
