"""Tune a layer: time candidate configs on all ranks together, and store the fastest one."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable

from cometrt.errors import CapacityError, MismatchError, PeerTimeout, RoutingError
from cometrt.executor import Executor
from cometrt.plan import TileConfig
from cometrt.plan.config import RAIL_FIELDS
from cometrt.specs import Geometry
from cometrt.tuner.cache import cache_file, key_of, store
from cometrt.tuner.rail import Rail, rail_of
from cometrt.tuner.search import (
    Found,
    candidates,
    describe,
    roomiest,
    search,
    sweep,
    with_own_backward,
)
from cometrt.types import Array
from cometrt.world import World
from cometrt.world.partitions import num_sms

_log = logging.getLogger("cometrt")

_RAISED_ON_ALL_RANKS = (RoutingError, CapacityError, PeerTimeout, MismatchError)

Progress = Callable[[int, dict[str, float]], object]
"""Called with the number of trials so far, and the shortest milliseconds of any of them by pass."""


def tune(
    world: World,
    geometry: Geometry,
    layer: int,
    base: TileConfig,
    inputs: tuple[Array, ...] | None,
    training: bool,
    budget_sec: float,
    problem: str,
    progress: Progress | None = None,
) -> tuple[TileConfig, Executor | None]:
    """Collective, on "cuda", after this rank's calls have ended: see `MoELayer.tune`.

    Args:
        layer: the layer's index.
        base: its current config, where the search starts.
        inputs, training, budget_sec: as for `MoELayer.tune`, checked.
        problem: the error message of this rank's arguments, or "".
        progress: called after each trial on rank 0; None: nobody watches.

    Returns:
        (the fastest config, its executor). The executor is None if the config is `base`, but not
        over several nodes.

    Raises:
        ValueError: on all ranks, if any rank has a problem.
        CometError: on all ranks, if any rank failed.
    """
    given = (problem, inputs is None, training, budget_sec)
    ranks = world.allgather(given, purpose="tune")
    for rank, (text, *_) in enumerate(ranks):
        if text:
            raise ValueError(f"{text} [rank {rank}]")
    if len(set(ranks)) > 1:
        raise ValueError(
            "inputs (given or not), training and budget_sec must be equal on all ranks"
        )
    try:
        found = find(world, geometry, layer, base, inputs, training, budget_sec, progress)
        if world.rank == 0:
            store(cache_file(), key_of(world, geometry.spec), found.config, found.ms)
        world.barrier()  # a layer that any rank makes after tune() finds the stored config
        if found.config == base and world.nodes == 1:
            return base, None
        return found.config, Rail(world, geometry, layer).make(found.config)
    except _RAISED_ON_ALL_RANKS:
        raise
    except BaseException as error:
        world.stop_for(error, f" in tune() of layer {layer}")
        raise


def find(
    world: World,
    geometry: Geometry,
    layer: int,
    base: TileConfig,
    inputs: tuple[Array, ...] | None,
    training: bool,
    budget_sec: float,
    progress: Progress | None = None,
) -> Found:
    """Collective: the search alone. Arguments as for `tune`, equal on all ranks."""
    from cometrt.cuda.trials import Trials

    gpu = world.node.gpu
    assert gpu is not None
    if gpu.last_call is not None:  # after it no kernel of any layer waits for a peer
        gpu.last_call.synchronize()
    spec, size, nodes = geometry.spec, world.size, world.nodes
    sms = min(world.allgather(num_sms(), purpose="tune"))
    if training:
        base = with_own_backward(base, sms)
    settings = candidates(base, spec, world.ranks_per_node, sms, training=training)
    rail = Rail(world, geometry, layer)
    of_rail = rail.settings(base, sms, training=training)
    trials = Trials(world, geometry, rail.make, inputs, training, roomiest(base, settings))

    count, best_ms = 0, dict[str, float]()

    def time(config: TileConfig, which: str, counts: tuple[int, int] | None = None) -> float:
        nonlocal count
        if not rail.has_room(config, training):
            return math.inf
        try:
            ms = trials.time(config, which, counts)
        except CapacityError:  # a slice has room for its share of the rows
            if rail_of(config) == rail_of(base):
                raise
            rail.refused.add(rail_of(config))
            return math.inf
        count, best_ms[which] = count + 1, min(ms, best_ms.get(which, ms))
        if world.rank == 0:
            _log.info("%s %.4f ms: %s", which, ms, describe(config))
            if progress is not None:
                progress(count, dict(best_ms))
        return ms

    def expired() -> bool:
        return trials.elapsed_sec + trials.longest_sec > budget_sec

    found = search(base, of_rail + settings, spec, size, time, expired, nodes)
    if not expired():
        # All of the sweep have the same rail: each change of it takes new executors.
        of_found = {name: getattr(found.config, name) for name in RAIL_FIELDS}
        start = dataclasses.replace(base, **of_found)
        found = sweep(start, found, settings, spec, size, time, expired, nodes)
    trials.close()
    return found
