"""`World.reset`: all ranks agree on a new generation, and on the largest epoch and sequence."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, SupportsInt

from cometrt.world.control_block import value_of
from cometrt.world.failure import WaitTarget
from cometrt.world.peer_status import gone, ordinal

if TYPE_CHECKING:
    from cometrt.world.base import World


def reset(world: World) -> None:
    """As `World.reset`."""
    control_block = world.control_block
    if world.gpu:
        world.epoch = control_block["epoch"][0] = world.gpu.read_epoch()
    try:
        for peer in range(world.size):
            _wait(world, functools.partial(_requested, world, peer), peer, 1)
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


def _requested(world: World, peer: int) -> bool:
    """Whether the peer requests at least this rank's generation.

    A rank whose last reset failed half-way requests a later generation; this rank adopts it.
    """
    requests = [int(control_block["reset_request"][0]) for control_block in world.control_blocks]
    world.control_block["reset_request"][0] = max(world.generation + 1, *requests)
    return requests[peer] >= int(world.control_block["reset_request"][0])


def _wait(world: World, read: Callable[[], SupportsInt], peer: int, expected: int) -> None:
    def lost() -> str:
        end_device_waits(world, "called world.reset()")
        return gone(world, peer)

    target = WaitTarget("reset", peer, expected)
    world.wait(read, target, even_if_stopped=True, gone=lost)


def end_device_waits(world: World, did: str) -> None:
    """Stop the world if a peer's kernels wait for a call that this rank will not make.

    Kernels do not read the host's control blocks, so they would wait until their deadline.

    Args:
        did: what this rank did instead, for the error message.
    """
    left = any(control_block["closing"][0] < 0 for control_block in world.control_blocks)
    if world.gpu is None or world.stopped or left:  # memory of a rank that left may be gone
        return
    epochs = world.gpu.read_epochs(range(world.size))
    calls = epochs[world.rank]
    for peer, epoch in enumerate(epochs):
        if epoch > calls:
            reason = (
                f"rank {world.rank} {did} after {calls} calls; "
                f"rank {peer} is in its {ordinal(epoch)} call"
            )
            target = WaitTarget("source_ready", world.rank, calls + 1, calls + 1)
            world.stop(target.lost(peer, calls, reason).numbered_from(world.first_rank))
            return
