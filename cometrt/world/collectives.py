"""Host collectives: an allgather of Python values over the control blocks."""

from __future__ import annotations

import functools
import pickle
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from cometrt.errors import MismatchError
from cometrt.world.control_block import MESSAGE_BYTES, value_of
from cometrt.world.failure import Failure, WaitTarget
from cometrt.world.peer_status import in_exchange

if TYPE_CHECKING:
    from cometrt.world.base import World

Value = TypeVar("Value")


def allgather(world: World, value: Value, purpose: str) -> list[Value]:
    """As `World.allgather`. A long value takes several messages."""
    world.check_running()
    payload = pickle.dumps((purpose, value))
    first = _exchange(world, len(payload), payload[:MESSAGE_BYTES])
    longest = max(total for total, _ in first)
    messages = [[message] for _, message in first]
    for begin in range(MESSAGE_BYTES, longest, MESSAGE_BYTES):
        more = _exchange(world, len(payload), payload[begin : begin + MESSAGE_BYTES])
        for rank, (_, message) in enumerate(more):
            messages[rank].append(message)
    payloads = [
        pickle.loads(b"".join(parts)[:total])
        for parts, (total, _) in zip(messages, first, strict=True)
    ]
    purposes = [payload[0] for payload in payloads]
    if len(set(purposes)) > 1:
        text = "ranks called different collectives: " + ", ".join(
            f"rank {rank}: {name}" for rank, name in enumerate(purposes, world.first_rank)
        )
        world.stop(Failure(kind="mismatch", waiter=world.rank + world.first_rank, text=text))
        raise MismatchError(text)
    return [payload[1] for payload in payloads]


def _exchange(world: World, total: int, message: bytes) -> list[tuple[int, bytes]]:
    """Exchange one message: (size of the whole payload, message) of every rank.

    A rank is at most one message ahead of its peers, so two message buffers, selected by the
    parity of the sequence number, are enough.
    """
    world.sequence += 1
    parity, control_block = world.sequence & 1, world.control_block
    control_block["message_bytes"][parity] = total
    control_block["message"][parity, : len(message)] = np.frombuffer(message, np.uint8)
    world.fence()
    control_block["sequence"][0] = world.sequence
    for peer in range(world.size):
        target = WaitTarget("rendezvous", peer, world.sequence)
        mismatch = functools.partial(in_exchange, world, peer)
        world.wait(value_of(world.control_blocks[peer]["sequence"]), target, mismatch=mismatch)
    return [
        (int(peer["message_bytes"][parity]), peer["message"][parity].tobytes())
        for peer in world.control_blocks
    ]
