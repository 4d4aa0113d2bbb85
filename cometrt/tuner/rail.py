"""What the tuner does besides for a layer over several nodes: settings of the rail."""

from __future__ import annotations

import logging
from typing import Any

from cometrt.executor import Executor
from cometrt.memory import room_problem
from cometrt.node_specs import geometry_of_node
from cometrt.nodes import make_executor
from cometrt.nodes.nccl_sms import least_nccl_sms
from cometrt.nodes.slices import RailSlices
from cometrt.plan import PlanShape, TileConfig
from cometrt.plan.config import MAX_RAIL_SLICES
from cometrt.specs import Geometry
from cometrt.tuner.search import PASSES, Setting
from cometrt.world import World

_log = logging.getLogger("cometrt")

_RAIL_SLICES = (3, 4, 6)
_RAIL_PARTS = (1, 2)


def rail_of(config: TileConfig) -> tuple[int, int]:
    """What calls over several nodes are cut into: rail_slices and rail_parts."""
    return config.rail_slices, config.rail_parts


def rail_settings(
    base: TileConfig,
    nodes: int,
    least_sms: int | None,
    sms: int,
    *,
    training: bool,
    late: bool = False,
) -> list[Setting]:
    """The changes to try that only a layer over several nodes has.

    Args:
        least_sms: the fewest SMs that may be left to NCCL where tokens cross meanwhile; None:
            NCCL's CTAs have no bound, so that one slice alone is allowed.
        sms: SMs of the smallest rank.
        late: whether there may be late parts.
    """
    if least_sms is None or sms < least_sms + 2:
        return []
    passes = PASSES if training else PASSES[:1]
    counts = sorted({1, *_RAIL_SLICES, min(2 * nodes, MAX_RAIL_SLICES), base.rail_slices})
    rails = [(count, 0) for count in counts]
    rails += [(1, parts) for parts in sorted({*_RAIL_PARTS, base.rail_parts} - {0}) if late]
    names = "rail_slices", "rail_parts", "nccl_sms"
    settings = [Setting(passes, [dict(zip(names, (*of, None), strict=True)) for of in rails])]
    if sms >= 2 * least_sms + 2:  # None: the fewest
        settings.append(Setting(passes, [{"nccl_sms": left} for left in (None, 2 * least_sms)]))
    return settings


class Rail:
    """Which slices a layer can have, and its executors.

    Attributes:
        refused: values of `rail_of` that memory or capacity does not suffice for.
    """

    def __init__(self, world: World, geometry: Geometry, layer: int) -> None:
        self._world, self._geometry, self._layer = world, geometry, layer
        self.refused: set[tuple[int, int]] = set()
        self._checked: set[tuple[int, int]] = set()

    def settings(self, base: TileConfig, sms: int, *, training: bool) -> list[Setting]:
        """Collective: as `rail_settings`, equal on all ranks. None on one node.

        Args:
            sms: as for `rail_settings`, equal on all ranks.
        """
        world: Any = self._world
        self._checked.add(rail_of(base))  # the layer itself has them
        if world.nodes == 1:
            return []
        least = [int(n or 0) for n in world.allgather(least_nccl_sms(world), purpose="tune")]
        late = not any(world.allgather(world.nccl.clusters, purpose="tune"))
        most = max(least) if all(least) else None
        settings = rail_settings(base, world.nodes, most, sms, training=training, late=late)
        if not settings and world.rank == 0:
            reason = "no SMs are left" if all(least) else "NCCL_MAX_CTAS is not set on all ranks"
            _log.warning("tune() tries rail_slices=1 alone: %s", reason)
        return settings

    def has_room(self, config: TileConfig, training: bool) -> bool:
        """Collective: whether the memory of a layer with the config's slices or late parts is
        available, and they are not refused."""
        rail = rail_of(config)
        if rail not in self._checked:
            self._checked.add(rail)
            shape, slices = self._shape(config)
            if room_problem(self._world, shape, "fused", slices, training=training):
                self.refused.add(rail)
        return rail not in self.refused

    def make(self, config: TileConfig) -> Executor:
        """Collective: an executor of the layer with this config."""
        shape, slices = self._shape(config)
        spec = self._geometry.spec
        _, executor = make_executor(self._world, spec, shape, slices, self._layer, "fused")
        return executor

    def _shape(self, config: TileConfig) -> tuple[PlanShape, RailSlices]:
        world, spec, rail = self._world, self._geometry.spec, rail_of(config)
        of_node = geometry_of_node(spec, world.rank, world.size, world.nodes, *rail)
        slices = RailSlices.of(spec, world.nodes, world.node_index, *rail)
        return PlanShape(of_node, config.of_node()), slices
