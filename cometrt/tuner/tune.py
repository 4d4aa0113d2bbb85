"""Tune a layer: time candidate configs on all ranks together, and store the fastest one."""

from __future__ import annotations

from cometrt.errors import CapacityError, MismatchError, PeerTimeout, RoutingError
from cometrt.executor import Executor
from cometrt.plan import TileConfig
from cometrt.specs import Geometry
from cometrt.tuner.cache import cache_file, key_of, store
from cometrt.tuner.search import candidates, search
from cometrt.types import Array
from cometrt.world import World
from cometrt.world.partitions import num_sms

_RAISED_ON_ALL_RANKS = (RoutingError, CapacityError, PeerTimeout, MismatchError)


def tune(
    world: World,
    geometry: Geometry,
    layer: int,
    base: TileConfig,
    inputs: tuple[Array, ...] | None,
    training: bool,
    problem: str,
) -> tuple[TileConfig, Executor | None]:
    """Collective, on "cuda", after this rank's calls have ended: see `MoELayer.tune`.

    Args:
        layer: the layer's index.
        base: its current config, where the search starts.
        inputs, training: as for `MoELayer.tune`, checked.
        problem: the error message of this rank's arguments, or "".

    Returns:
        (the fastest config, its executor). The executor is None if the config is `base`.

    Raises:
        ValueError: on all ranks, if any rank has a problem.
        CometError: on all ranks, if any rank failed.
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
        if world.gpu.last_call is not None:  # after it no kernel of any layer waits for a peer
            world.gpu.last_call.synchronize()
        sms = min(world.allgather(num_sms(), purpose="tune"))
        trials = Trials(world, geometry, layer, inputs, training)
        settings = candidates(base, spec, world.size, sms)
        best, ms = search(base, settings, spec, world.size, trials.time)
        if world.rank == 0:
            store(cache_file(), key_of(world, spec), best, ms)
        world.barrier()  # a layer that any rank makes after tune() finds the stored config
        return best, None if best == base else trials.executor(best)
    except _RAISED_ON_ALL_RANKS:
        raise
    except BaseException as error:
        world.stop_for(error, f" in tune() of layer {layer}")
        raise
