"""`World.wait`: polling a flag with a deadline, while watching the peer and the world."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, SupportsInt

from cometrt.world.failure import Failure, WaitTarget
from cometrt.world.peer_status import gone_or_resetting

if TYPE_CHECKING:
    from cometrt.world.base import World

_MIN_PAUSE_SEC, _MAX_PAUSE_SEC = 50e-6, 1e-3  # between two reads


def wait(
    world: World,
    read: Callable[[], SupportsInt],
    target: WaitTarget,
    even_if_stopped: bool,
    mismatch: Callable[[], str],
    gone: Callable[[], str] | None,
) -> None:
    """As `World.wait`."""
    gone = gone or functools.partial(gone_or_resetting, world, target.peer)
    deadline = time.monotonic() + world.timeout_sec
    pause = _MIN_PAUSE_SEC
    while (found := int(read())) < target.expected:
        failure = None
        if text := mismatch():
            failure = Failure("mismatch", world.rank, text)
        elif text := gone():
            failure = target.lost(world.rank, found, text)
        elif time.monotonic() > deadline:
            failure = target.expired(world.rank, found, world.timeout_sec)
        if failure or (not even_if_stopped and world.stopped):
            world.fence()
            # The peer may have signalled after `read` and before it left: read once more.
            if int(read()) >= target.expected:
                break
            if not even_if_stopped:
                world.check_running()
        if failure:
            failure = failure.numbered_from(world.first_rank)
            if not even_if_stopped:
                world.stop(failure.for_peers())
            raise failure.error()
        time.sleep(pause)
        pause = min(2 * pause, _MAX_PAUSE_SEC)
    world.fence()
