"""Meetings of all ranks on the host: everyone's value to everyone, in rounds of message."""

from __future__ import annotations

import functools
import pickle
from typing import TYPE_CHECKING, Any

import numpy as np

from cometrt.errors import MismatchError
from cometrt.world.control_block import MESSAGE_BYTES, value_of
from cometrt.world.failure import Failure, WaitTarget
from cometrt.world.whereabouts import exchanging

if TYPE_CHECKING:
    from cometrt.world.base import World


def allgather(world: World, value: Any, purpose: str) -> list[Any]:
    """As `World.allgather`."""
    world.check_running()
    payload = pickle.dumps((purpose, value))
    parts = _exchange(world, len(payload), payload[:MESSAGE_BYTES])
    longest = max(total for total, _ in parts)
    pieces = [[piece] for _, piece in parts]
    for begin in range(MESSAGE_BYTES, longest, MESSAGE_BYTES):
        more = _exchange(world, len(payload), payload[begin : begin + MESSAGE_BYTES])
        for rank, (_, piece) in enumerate(more):
            pieces[rank].append(piece)
    messages = [
        pickle.loads(b"".join(piece)[:total])
        for piece, (total, _) in zip(pieces, parts, strict=True)
    ]
    purposes = [message[0] for message in messages]
    if len(set(purposes)) > 1:
        text = "ranks met for different things: " + ", ".join(
            f"rank {rank}: {name}" for rank, name in enumerate(purposes)
        )
        world.stop(Failure(kind="mismatch", waiter=world.rank, text=text))
        raise MismatchError(text)
    return [message[1] for message in messages]


def _exchange(world: World, total: int, piece: bytes) -> list[tuple[int, bytes]]:
    """One round of message. A rank is at most one round ahead: two parities are enough."""
    world.sequence += 1
    parity, control_block = world.sequence & 1, world.control_block
    control_block["message_bytes"][parity] = total
    control_block["message"][parity, : len(piece)] = np.frombuffer(piece, np.uint8)
    world.fence()
    control_block["sequence"][0] = world.sequence
    for peer in range(world.size):
        wanted = WaitTarget("rendezvous", peer, world.sequence)
        misplaced = functools.partial(exchanging, world, peer)
        world.wait(value_of(world.control_blocks[peer]["sequence"]), wanted, misplaced=misplaced)
    return [
        (int(peer["message_bytes"][parity]), peer["message"][parity].tobytes())
        for peer in world.control_blocks
    ]
