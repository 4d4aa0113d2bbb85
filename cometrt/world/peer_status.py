"""What a peer does instead of sending an expected signal, read from its control block.

Each function returns a sentence for an error message, or "" if it does not apply. A peer may have
signalled before it went on. So the caller must fence and read the awaited flag again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cometrt.world.base import World

_EXCHANGES = ("layer.forward", "layer.backward")


def gone(world: World, peer: int) -> str:
    """The peer has closed or left the world, and takes part in nothing any more."""
    closing = int(world.control_blocks[peer]["closing"][0])
    if not closing:
        return ""
    return _text(world, peer, "has closed the world" if closing > 0 else "has left the world")


def gone_or_resetting(world: World, peer: int) -> str:
    """The peer is gone, or waits for this rank in ``world.reset()``."""
    if int(world.control_blocks[peer]["reset_request"][0]) > world.generation:
        return _text(world, peer, "called world.reset()")
    return gone(world, peer)


def in_collective(world: World, peer: int) -> str:
    """The peer is in a collective, while this rank waits for it in an exchange."""
    if int(world.control_blocks[peer]["sequence"][0]) <= world.sequence:
        return ""
    text = _text(world, peer, "called a collective (MoELayer, barrier or allgather)")
    return f"ranks made different calls: {text}"


def in_exchange(world: World, peer: int) -> str:
    """The peer is in an exchange, while this rank waits for it in a collective."""
    epoch = int(world.control_blocks[peer]["epoch"][0])
    if epoch <= world.epoch:
        return ""
    return (
        f"ranks made different calls: rank {peer} began its {ordinal(epoch)} call while this "
        f"rank waits for it in the collective {_call(world)}"
    )


def ordinal(number: int) -> str:
    """The English ordinal: 1st, 2nd, 3rd, 4th."""
    teens = number % 100 in (11, 12, 13)
    return f"{number}{'th' if teens else {1: 'st', 2: 'nd', 3: 'rd'}.get(number % 10, 'th')}"


def _text(world: World, peer: int, did: str) -> str:
    calls = int(world.control_blocks[peer]["epoch"][0])
    if world.one_call.name in _EXCHANGES:
        here = f"is in its {ordinal(max(world.epoch, calls + 1))} call"
    else:
        here = f"waits for it in {_call(world)}"
    return f"rank {peer} {did} after {calls} call{'' if calls == 1 else 's'}; this rank {here}"


def _call(world: World) -> str:
    name = world.one_call.name
    return f"{name}()" if name else "a world's construction"
