"""Meetings of all ranks on the host: everyone's value to everyone, in rounds of mail."""

from __future__ import annotations

import functools
import pickle
from typing import TYPE_CHECKING, Any

import numpy as np

from cometrt.errors import MismatchError
from cometrt.world.board import MAIL_BYTES, value_of
from cometrt.world.failure import Failure, Wanted

if TYPE_CHECKING:
    from cometrt.world.base import World


class Meetings:
    """One rank's side of them."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.round = 0  # mail exchanged so far; equal on all ranks between calls

    def allgather(self, value: Any, purpose: str) -> list[Any]:
        """As `World.allgather`."""
        world = self._world
        world.check_running()
        payload = pickle.dumps((purpose, value))
        parts = self._exchange(len(payload), payload[:MAIL_BYTES])
        longest = max(total for total, _ in parts)
        pieces = [[piece] for _, piece in parts]
        for begin in range(MAIL_BYTES, longest, MAIL_BYTES):
            more = self._exchange(len(payload), payload[begin : begin + MAIL_BYTES])
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

    def _exchange(self, total: int, piece: bytes) -> list[tuple[int, bytes]]:
        """One round of mail. A rank is at most one round ahead: two parities are enough."""
        world = self._world
        self.round += 1
        parity, board = self.round & 1, world.board
        board["mail_bytes"][parity] = total
        board["mail"][parity, : len(piece)] = np.frombuffer(piece, np.uint8)
        world.fence()
        board["round"][0] = self.round
        for peer in range(world.size):
            wanted = Wanted("rendezvous", peer, self.round)
            misplaced = functools.partial(self._is_exchanging, peer)
            world.wait(value_of(world.boards[peer]["round"]), wanted, misplaced=misplaced)
        return [
            (int(peer["mail_bytes"][parity]), peer["mail"][parity].tobytes())
            for peer in world.boards
        ]

    def _is_exchanging(self, peer: int) -> str:
        """How a peer that this rank waits for in a meeting has gone on without it."""
        world = self._world
        if int(world.boards[peer]["epoch"][0]) <= world.epoch:
            return ""
        return (
            f"ranks called different things: rank {peer} began the exchange of epoch "
            f"{world.epoch + 1} while rank {world.rank} waits for it in a meeting"
        )

    def has_gone_to(self, peer: int) -> str:
        """How a peer that this rank waits for in an exchange has gone to a meeting instead."""
        world = self._world
        if int(world.boards[peer]["round"][0]) <= self.round:
            return ""
        return (
            f"ranks called different things: rank {peer} went to a meeting (a layer made, a "
            f"barrier) while rank {world.rank} waits for it in the exchange of epoch {world.epoch}"
        )
