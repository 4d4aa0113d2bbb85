"""What all ranks of a layer have to agree on when it is made."""

from __future__ import annotations

from typing import Any

from cometrt.plan import PlanShape, TileConfig
from cometrt.specs import Geometry, MoESpec, check_choice
from cometrt.tuner.cache import look_up
from cometrt.world import World

MOST_HIDDEN = 28672  # a row a warp of `dispatch` in the shared memory of an SM
MOST_TOPK = 1024  # kMostReportedIds of kernels_cu/exchange/call.cuh
MODES = ("fused", "sequential", "chunked")


def agree(world: World, spec: Any, mode: Any, given: Any) -> tuple[int, TileConfig]:
    """Compare all ranks' arguments, wrong ones too, so that all raise the same.

    Returns:
        the layer's number and its config, equal on all ranks: where none is given, rank 0's.
    """
    problem, config = "", TileConfig()
    try:
        if not isinstance(spec, MoESpec):
            raise ValueError(f"spec must be a cometrt.MoESpec (got {type(spec)!r})")
        if given is not None and not isinstance(given, TileConfig):
            raise ValueError(f"config must be a TileConfig (got {type(given)!r})")
        if mode is not None:
            check_choice("mode", mode, MODES)
        geometry = Geometry(spec, world.rank, world.size)
        if given is not None:
            config = given
        elif world.rank == 0:
            config = look_up(world, spec, mode) or config
        terms = spec.topk + world.size
        config.check_on(world.device, mode or config.best_mode(world.device, terms), terms)
        if world.device == "cuda" and spec.dtype != "bfloat16":
            raise ValueError(f"dtype must be 'bfloat16' on device='cuda' (got {spec.dtype!r})")
        for name, most in (("hidden", MOST_HIDDEN), ("topk", MOST_TOPK)):
            if world.device == "cuda" and getattr(spec, name) > most:
                raise ValueError(
                    f"{name} must be at most {most} on device='cuda' (got {getattr(spec, name)})"
                )
        PlanShape(geometry, config)
    except ValueError as error:
        problem = str(error)
    mine = (problem, repr(spec), repr(mode), repr(given), config, world.num_layers)
    ranks = world.allgather(mine, purpose="MoELayer")
    number = max(rank[-1] for rank in ranks)
    world.num_layers = number + 1
    for rank, (text, *_) in enumerate(ranks):
        if text:
            raise ValueError(f"{text} [rank {rank}]")
    for rank, values in enumerate(ranks):
        for name, value, first in zip(
            ("spec", "mode", "config"), values[1:4], ranks[0][1:4], strict=True
        ):
            if value != first:
                raise ValueError(
                    f"{name} must be equal on all ranks "
                    f"(got {first} on rank 0, {value} on rank {rank})"
                )
    return number, ranks[0][4]
