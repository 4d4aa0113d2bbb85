"""Limit BLAS to one thread while a world is open.

The bits of a BLAS result depend on the number of its threads, and every rank already computes on a
thread of its own. The limit applies to the whole process until the last world is closed. With
threadpoolctl only the first Python thread that sets a limit can do so, as long as it lives. So
`spawn` sets it on the caller's thread, and not on the threads of its ranks.
"""

from __future__ import annotations

import threading

import threadpoolctl

_lock = threading.Lock()
_users = 0
_limits: threadpoolctl.threadpool_limits | None = None


def pin_blas_threads() -> None:
    """Set the limit for one more world."""
    global _users, _limits
    with _lock:
        _users += 1
        if _users == 1:
            _limits = threadpoolctl.threadpool_limits(limits=1, user_api="blas")


def unpin_blas_threads() -> None:
    """Undo one `pin_blas_threads`. The last one removes the limit."""
    global _users, _limits
    with _lock:
        _users -= 1
        if _users == 0 and _limits is not None:
            _limits.restore_original_limits()
            _limits = None
