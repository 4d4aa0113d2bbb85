"""One BLAS thread while a host world is open.

Every rank computes on a thread of its own, and BLAS gives other bits with another number of
threads. The limit holds for the whole process and goes when the last world is closed. threadpoolctl
lets one Python thread alone set it, the first, as long as that lives: so `spawn` sets it from the
thread that calls it, which is the one that calls `connect` too, and not from its ranks' threads.
"""

from __future__ import annotations

import threading

import threadpoolctl

_lock = threading.Lock()
_users = 0
_limits: threadpoolctl.threadpool_limits | None = None


def pin_blas_threads() -> None:
    global _users, _limits
    with _lock:
        _users += 1
        if _users == 1:
            _limits = threadpoolctl.threadpool_limits(limits=1, user_api="blas")


def unpin_blas_threads() -> None:
    global _users, _limits
    with _lock:
        _users -= 1
        if _users == 0 and _limits is not None:
            _limits.restore_original_limits()
            _limits = None
