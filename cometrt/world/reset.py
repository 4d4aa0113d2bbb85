"""`World.reset`: ranks agree on a generation, an epoch and a round beyond all that were used."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from cometrt.world.control_block import value_of
from cometrt.world.failure import WaitTarget
from cometrt.world.whereabouts import gone, ordinal

if TYPE_CHECKING:
    from cometrt.world.base import World


def reset(world: World) -> None:
    """As `World.reset`."""
    control_block = world.control_block
    if world.gpu:
        world.epoch = control_block["epoch"][0] = world.gpu.read_epoch()
    try:
        for peer in range(world.size):
            _wait(world, functools.partial(_asked, world, peer), peer, 1)
        generation = int(control_block["reset_request"][0])
        world.epoch = max(int(other["epoch"][0]) for other in world.control_blocks)
        world.sequence = max(int(other["sequence"][0]) for other in world.control_blocks)
        control_block["epoch"][0], control_block["sequence"][0] = world.epoch, world.sequence
        world.fence()
        control_block["generation"][0] = generation
        if world.gpu:
            world.gpu.begin_generation(generation, world.epoch)
        for peer in range(world.size):
            _wait(world, value_of(world.control_blocks[peer]["generation"]), peer, generation)
    except BaseException:
        control_block["reset_request"][0] = 0
        raise
    finally:
        world.generation = int(control_block["generation"][0])


def _asked(world: World, peer: int) -> bool:
    """Whether the peer asks for the generation that this rank asks for. A rank whose last reset
    failed half-way asks for a later one: follow it."""
    requests = [int(control_block["reset_request"][0]) for control_block in world.control_blocks]
    world.control_block["reset_request"][0] = max(world.generation + 1, *requests)
    return requests[peer] >= int(world.control_block["reset_request"][0])


def _wait(world: World, read: Callable[[], Any], peer: int, expected: int) -> None:
    def lost() -> str:
        end_device_waits(world, "called world.reset()")
        return gone(world, peer)

    wanted = WaitTarget("reset", peer, expected)
    world.wait(read, wanted, even_if_stopped=True, absent=lost)


def end_device_waits(world: World, did: str) -> None:
    """For a rank that makes no more calls: stop the world if a peer's kernels wait for one, since
    they look at no control_block. `did`: what this rank did instead."""
    left = any(
        control_block["closing"][0] < 0 for control_block in world.control_blocks
    )  # and their memory may be gone
    if world.gpu is None or world.stopped or left:
        return
    epochs = world.gpu.read_epochs(range(world.size))
    calls = epochs[world.rank]
    for peer, epoch in enumerate(epochs):
        if epoch > calls:
            reason = (
                f"rank {world.rank} {did} after {calls} calls; "
                f"rank {peer} is in its {ordinal(epoch)} call"
            )
            wanted = WaitTarget("source_ready", world.rank, calls + 1, calls + 1)
            world.stop(wanted.lost(peer, calls, reason))
            return
