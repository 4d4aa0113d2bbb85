"""Errors of a call that has begun. A wrong argument is a plain ``ValueError`` before it begins."""

from __future__ import annotations


class CometError(RuntimeError):
    """Base class of all errors of cometrt besides ``ValueError``.

    Attributes:
        relayed: True if another thread or rank raised the error and this one only reports it.
    """

    relayed: bool = False


class CallNotBegun(Exception):
    """Internal: the call has had no effect on any rank; the layer raises `reason` instead."""

    def __init__(self, reason: CometError | ValueError) -> None:
        self.reason = reason


def first_original(errors: list[tuple[float, BaseException]]) -> BaseException:
    """The earliest of (time, error) that is not relayed; if all are relayed, the earliest."""
    return min(errors, key=lambda item: (getattr(item[1], "relayed", False), item[0]))[1]


class RoutingError(CometError):
    """A routing table is invalid: an id outside [-1, E), a repeated id, or a weight not finite.

    Every rank reads the tables of all ranks, so every rank raises the same error; of several errors
    in a call over several nodes on "cuda", nodes may raise different ones. No tokens were
    exchanged. The layer may be called again.

    Attributes:
        rank: the rank that passed the table.
        token, k: the first invalid pair in it.
        expert_id: its id, as far as an int32 holds it; 0 on "cuda" over several nodes.
    """

    rank: int
    token: int
    k: int
    expert_id: int = 0

    @classmethod
    def build(cls, table: str, problem: str, *, rank: int, token: int, k: int) -> RoutingError:
        """`table`: name of the argument; `problem`: the rule that it breaks."""
        error = cls(f"{table} of rank {rank}, token {token}, k {k} {problem}")
        error.rank, error.token, error.k = rank, token, k
        return error


class CapacityError(CometError):
    """A rank would need more rows than its buffers hold: see ``MoESpec.capacity_factor``. Or, over
    several nodes, more of its tokens would cross to a node than ``MoESpec.rail_tokens``.

    Every rank raises the same error (but see RoutingError). No tokens were exchanged. The layer may
    be called again.

    Attributes:
        rank: the rank that needs most rows; or the first one of which too many tokens would cross.
        need: rows that it needs, padding rows included; or tokens that would cross.
        capacity: rows that its buffers hold; or ``rail_tokens``.
        capacity_factor: the ``MoESpec.capacity_factor`` that would have been enough.
    """

    rank: int
    need: int
    capacity: int
    capacity_factor: float

    @classmethod
    def build(cls, *, rank: int, need: int, capacity: int, capacity_factor: float) -> CapacityError:
        """Arguments: its attributes."""
        error = cls(
            f"rank {rank} needs {need} rows (padding rows included) but its capacity is "
            f"{capacity}: balance the router, or raise MoESpec.capacity_factor "
            f"({capacity_factor:.2f} is enough)"
        )
        error.rank, error.need = rank, need
        error.capacity, error.capacity_factor = capacity, capacity_factor
        return error


class PeerTimeout(CometError):
    """A wait failed: its deadline passed, or a peer raised an error or left the world.

    The world refuses further calls until ``world.reset()``.

    An attribute that does not apply is -1 or "".

    Attributes:
        waiter: the rank whose wait failed, or that raised an error.
        flag: the flag that it waited for, for example ``"partials_ready"``.
        peer: the rank that should have signalled the flag.
        tile: the M-tile or token block that the flag guards.
        chunk: the N-chunk that the flag guards.
        epoch: the epoch of the exchange.
        expected: the value that the wait needed.
        found: the last value that it read.
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
    """Ranks made different calls at the same time, for example forward and backward.

    The world refuses further calls until ``world.reset()``.
    """
