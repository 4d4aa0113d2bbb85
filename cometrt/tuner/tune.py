"""Tuning a layer: trials of all candidates on all ranks together, the best one kept."""

from __future__ import annotations

from typing import Any

from cometrt.errors import CapacityError, MismatchError, PeerTimeout, RoutingError
from cometrt.plan import TileConfig
from cometrt.specs import Geometry
from cometrt.tuner.cache import cache_file, key_of, store
from cometrt.tuner.search import candidates, search
from cometrt.world import World
from cometrt.world.partitions import num_sms

_KNOWN_BY_ALL = (RoutingError, CapacityError, PeerTimeout, MismatchError)


def tune(
    world: World,
    geometry: Geometry,
    layer: int,
    base: TileConfig,
    inputs: tuple[Any, ...] | None,
    training: bool,
    problem: str,
) -> tuple[TileConfig, Any]:
    """Collective, on "cuda", when this rank's calls have ended: see `MoELayer.tune`.

    Args:
        problem: what is wrong with this rank's arguments, or nothing.

    Returns:
        the best config, and its executor; None for the executor where it is `base`.

    Raises:
        ValueError: on all ranks, for a problem of any of them.
        CometError: on all ranks, whichever rank it was that failed.
    """
    ranks = world.allgather((problem, inputs is None, training), purpose="tune")
    for rank, (text, *_) in enumerate(ranks):
        if text:
            raise ValueError(f"{text} [rank {rank}]")
    if len(set(ranks)) > 1:
        raise ValueError("inputs (given or not) and training must be equal on all ranks")
    from cometrt.cuda.trials import Trials

    spec = geometry.spec
    try:
        assert world.gpu is not None
        if world.gpu.last_call is not None:  # of any layer: nothing waits for a peer from here on
            world.gpu.last_call.synchronize()
        sms = min(world.allgather(num_sms(), purpose="tune"))
        trials = Trials(world, geometry, layer, inputs, training)
        settings = candidates(base, spec, world.size, sms)
        best, ms = search(base, settings, spec, world.size, trials.time)
        if world.rank == 0:
            store(cache_file(), key_of(world, spec), best, ms)
        world.barrier()  # whoever makes a layer from here on finds it
        return best, None if best == base else trials.executor(best)
    except _KNOWN_BY_ALL:
        raise
    except BaseException as error:
        world.stop_for(error, f" in tune() of layer {layer}")
        raise
