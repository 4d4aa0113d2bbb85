"""Where a peer is that does not come: what its control block says, in words for users.

Each function returns a text, or nothing where it does not hold. What a peer did before it went
shows only after a fence: a caller looks again then whether what it waits for has come.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cometrt.world.base import World

_EXCHANGES = ("layer.forward", "layer.backward")


def gone(world: World, peer: int) -> str:
    """The peer has closed or left the world, and comes to nothing any more."""
    closing = int(world.control_blocks[peer]["closing"][0])
    if not closing:
        return ""
    return _text(world, peer, "has closed the world" if closing > 0 else "has left the world")


def elsewhere(world: World, peer: int) -> str:
    """The peer has gone, or waits for this rank in ``world.reset()``."""
    if int(world.control_blocks[peer]["reset_request"][0]) > world.generation:
        return _text(world, peer, "called world.reset()")
    return gone(world, peer)


def meeting(world: World, peer: int) -> str:
    """This rank waits for the peer in an exchange, and the peer has gone to a meeting."""
    if int(world.control_blocks[peer]["sequence"][0]) <= world.sequence:
        return ""
    text = _text(world, peer, "went to a meeting (a layer made, a barrier)")
    return f"ranks called different things: {text}"


def exchanging(world: World, peer: int) -> str:
    """This rank waits for the peer in a meeting, and the peer has gone on to an exchange."""
    epoch = int(world.control_blocks[peer]["epoch"][0])
    if epoch <= world.epoch:
        return ""
    return (
        f"ranks called different things: rank {peer} began its {ordinal(epoch)} call while this "
        f"rank waits for it in a meeting, {_call(world)}"
    )


def ordinal(number: int) -> str:
    """1st, 2nd, 3rd, 4th."""
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
