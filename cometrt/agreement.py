"""What all ranks of a layer have to agree on when it is made."""

from __future__ import annotations

import dataclasses
from typing import Any

from cometrt.plan import PlanShape, TileConfig
from cometrt.specs import Geometry, MoESpec, check_choice
from cometrt.tuner.cache import look_up
from cometrt.world import World

MAX_HIDDEN = 28672  # a row a warp of `dispatch` in the shared memory of an SM
MAX_TOPK = 1024  # kMostReportedIds of kernels_cu/exchange/call.cuh
MODES = ("fused", "sequential", "chunked")


def agree(world: World, spec: Any, mode: Any, given: Any) -> tuple[int, TileConfig]:
    """Compare all ranks' arguments, wrong ones too, so that all raise the same.

    Returns:
        the layer's number and its config, equal on all ranks: where none is given, rank 0's.
    """
    problem, config = "", TileConfig()
    try:
        check_layer(spec, world.rank, world.size, world.device, mode, given)
        if given is not None:
            config = given
        elif world.rank == 0:
            config = look_up(world, spec, mode) or config
    except ValueError as error:
        problem = str(error)
    mine = (problem, _told(spec), repr(mode), _told(given), config, world.num_layers)
    ranks = world.allgather(mine, purpose="MoELayer")
    number = max(rank[-1] for rank in ranks)
    world.num_layers = number + 1
    for rank, (text, *_) in enumerate(ranks):
        if text:
            raise ValueError(f"{text} [rank {rank}]")
    first = ranks[0]
    for rank, values in enumerate(ranks):
        for name, one, other in zip(
            ("spec", "mode", "config"), first[1:4], values[1:4], strict=True
        ):
            if one != other:
                raise ValueError(
                    f"{name} must be equal on all ranks (got {_differences(one, other)} on rank 0, "
                    f"{_differences(other, one)} on rank {rank})"
                )
    return number, first[4]


def check_layer(
    spec: Any, rank: int, size: int, device: str, mode: Any, config: Any
) -> tuple[PlanShape, str]:
    """What one rank knows to be wrong with a layer's arguments.

    Returns:
        the shape of its plan, and its mode, where None is given the best one.

    Raises:
        ValueError: naming the argument, its value and the rule.
    """
    if not isinstance(spec, MoESpec):
        raise ValueError(f"spec must be a cometrt.MoESpec (got {type(spec)!r})")
    if config is None:
        config = TileConfig()
    if not isinstance(config, TileConfig):
        raise ValueError(f"config must be a TileConfig (got {type(config)!r})")
    if mode is not None:
        check_choice("mode", mode, MODES)
    geometry, addends = Geometry(spec, rank, size), spec.topk + size
    mode = mode or config.best_mode(device, addends)
    config.check_on(device, mode, addends)
    if device == "cuda" and spec.dtype != "bfloat16":
        raise ValueError(f"dtype must be 'bfloat16' on device='cuda' (got {spec.dtype!r})")
    for name, most in (("hidden", MAX_HIDDEN), ("topk", MAX_TOPK)):
        if device == "cuda" and getattr(spec, name) > most:
            raise ValueError(
                f"{name} must be at most {most} on device='cuda' (got {getattr(spec, name)})"
            )
    return PlanShape(geometry, config), mode


def _told(record: Any) -> Any:
    """A spec or a config as (name, its fields), which differ field by field; else its repr."""
    if not isinstance(record, (MoESpec, TileConfig)):
        return repr(record)
    return type(record).__name__, dataclasses.asdict(record)


def _differences(one: Any, other: Any) -> str:
    """`one` of `_told`, of two records only where they differ."""
    if isinstance(one, str):
        return one
    name, fields = one
    others = {} if isinstance(other, str) else other[1]
    different = [f"{key}={value!r}" for key, value in fields.items() if others.get(key) != value]
    return f"{name}({', '.join(different)})"
