"""Errors that show only after a call was made. Wrong arguments are plain ``ValueError``."""

from __future__ import annotations


class CometError(RuntimeError):
    """Base of everything cometrt raises besides ``ValueError``.

    Attributes:
        relayed: it only tells of what another thread or rank raised.
    """

    relayed: bool = False


class CallNotBegun(Exception):
    """Internal: `reason` is to be raised, and the call has not happened on any rank."""

    def __init__(self, reason: CometError) -> None:
        self.reason = reason


def first_original(errors: list[tuple[float, BaseException]]) -> BaseException:
    """Of (time, error): the first that does not only tell of another one."""
    return min(errors, key=lambda item: (getattr(item[1], "relayed", False), item[0]))[1]


class RoutingError(CometError):
    """A routing table is invalid: an id outside [-1, E), a repeated id, a weight not finite.

    Every rank reads every rank's table, so every rank raises it. Nothing was exchanged, the
    layer may be called again.
    """


class CapacityError(CometError):
    """A rank would need more rows than its buffers hold (``MoESpec.capacity_factor``).

    Attributes:
        rank: the rank with the largest need.
        need: rows it needs, pad rows included.
        capacity: rows its buffers hold.
    """

    rank: int
    need: int
    capacity: int

    @classmethod
    def build(cls, *, rank: int, need: int, capacity: int, enough: float) -> CapacityError:
        """`enough` is a capacity_factor that would have done."""
        error = cls(
            f"rank {rank} needs {need} rows (padding included) but its capacity is {capacity}: "
            f"balance the router, or raise MoESpec.capacity_factor ({enough:.2f} is enough)"
        )
        error.rank, error.need, error.capacity = rank, need, capacity
        return error


class PeerTimeout(CometError):
    """A wait ended without what it waited for: its deadline passed, or a peer failed or has gone.

    The world refuses further calls until ``world.reset()``.

    Attributes (-1 or "" where one does not apply):
        waiter: rank whose wait expired, or that failed.
        flag: what it waited for, for example ``"partials_ready"``.
        peer: rank that should have signalled.
        tile: M-tile, or block of tokens, that the flag guards.
        chunk: chunk of columns that the flag guards.
        epoch: exchange in which it happened.
        expected, found: value the waiter needed, and the last one it read.
    """

    waiter: int = -1
    flag: str = ""
    peer: int = -1
    tile: int = -1
    chunk: int = -1
    epoch: int = -1
    expected: int = -1
    found: int = -1


class MismatchError(CometError):
    """Ranks called different things in the same exchange.

    The world refuses further calls until ``world.reset()``.
    """
