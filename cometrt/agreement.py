"""Compare the arguments of all ranks when a layer is made."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

from cometrt.legality import check_layer
from cometrt.node_specs import spec_of_node
from cometrt.nodes.nccl_sms import nccl_problem, overlap_of
from cometrt.plan import TileConfig
from cometrt.specs import MoESpec
from cometrt.tuner.cache import look_up
from cometrt.world import World

_log = logging.getLogger("cometrt")

# repr of an argument; for a spec or a config, its class name and its fields.
_Described = str | tuple[str, dict[str, object]]


def agree(
    world: World, spec: MoESpec, mode: str | None, given: object
) -> tuple[int, str, TileConfig]:
    """Collective: check this rank's arguments and compare them with those of all ranks.

    An illegal argument is exchanged like a legal one, so every rank raises the same error.

    Args:
        given: the caller's config. None: rank 0 looks one up in the tuned files, for all ranks.

    Returns:
        (layer index, mode, config), equal on all ranks.

    Raises:
        ValueError: on all ranks, if an argument is illegal on any rank or differs between ranks.
    """
    problem, config = "", TileConfig()
    try:
        check_layer(spec, world.size, world.device, mode, given, world.nodes)
        if isinstance(given, TileConfig):
            config = given
        elif world.rank == 0:
            config = _look_up(world, spec, mode) or config
    except ValueError as error:
        problem = str(error)
    mine = (problem, _describe(spec), repr(mode), _describe(given), config, world.num_layers)
    ranks = world.allgather(mine, purpose="MoELayer")
    layer = max(rank[-1] for rank in ranks)
    world.num_layers = layer + 1
    for rank, (text, *_) in enumerate(ranks):
        if text:
            raise ValueError(f"{text} [rank {rank}]")
    first = ranks[0]
    for rank, values in enumerate(ranks):
        arguments = zip(("spec", "mode", "config"), first[1:4], values[1:4], strict=True)
        for name, one, other in arguments:
            if one != other:
                raise ValueError(
                    f"{name} must be equal on all ranks (got {_difference(one, other)} on rank 0, "
                    f"{_difference(other, one)} on rank {rank})"
                )
    config = first[4]
    if given is None and overlap_of(config):
        config = _without_refused_slices(world, config)
    mode = check_layer(spec, world.size, world.device, mode, config, world.nodes)
    return layer, mode, config


def _look_up(world: World, spec: MoESpec, mode: str | None) -> TileConfig | None:
    """The config that was tuned for a layer over so many nodes, else for that of one node."""
    found = look_up(world, spec, mode)
    if found is None and world.nodes > 1:
        found = look_up(world.node, spec_of_node(spec, world.nodes), mode)
    return found


def _without_refused_slices(world: Any, config: TileConfig) -> TileConfig:
    """Collective: a tuned config, with one slice where NCCL_MAX_CTAS is not what it was."""
    problems = world.allgather(nccl_problem(world, config), purpose="MoELayer")
    if not any(problems):
        return config
    if world.rank == 0:
        problem = next(filter(None, problems))
        _log.warning("the tuned %s is not used: %s", overlap_of(config), problem)
    return dataclasses.replace(config, rail_slices=1, rail_parts=0, nccl_sms=None)


def _describe(argument: object) -> _Described:
    if not isinstance(argument, (MoESpec, TileConfig)):
        return repr(argument)
    return type(argument).__name__, dataclasses.asdict(argument)


def _difference(one: _Described, other: _Described) -> str:
    """The text of `one`: of a spec or a config only the fields that differ from `other`."""
    if isinstance(one, str):
        return one
    name, fields = one
    others = {} if isinstance(other, str) else other[1]
    different = [f"{key}={value!r}" for key, value in fields.items() if others.get(key) != value]
    return f"{name}({', '.join(different)})"
