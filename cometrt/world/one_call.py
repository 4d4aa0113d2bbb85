"""One call of a world at a time, from whatever thread: a world orders its calls."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator


class OneCall:
    """One rank's.

    Attributes:
        name: of the call under way, such as "layer.forward"; "" where there is none.
    """

    def __init__(self) -> None:
        self._lock, self.name = threading.RLock(), ""

    @contextlib.contextmanager
    def hold(self, name: str, *, inner: bool = False) -> Iterator[None]:
        """Within it the call `name` is under way.

        Args:
            inner: whether it may also be a part of another call.

        Raises:
            ValueError: if another call is under way, which goes on unharmed.
        """
        if not self._lock.acquire(blocking=False):
            raise self._overlap(name)
        outer = self.name
        try:
            if outer and not inner:
                raise self._overlap(name)
            self.name = outer or name
            yield
        finally:
            self.name = outer
            self._lock.release()

    def _overlap(self, name: str) -> ValueError:
        return ValueError(
            f"{name.split('.')[0]} must be called by one thread at a time: calls of a world follow "
            f"each other ({name}() came during {self.name or 'another call'}())"
        )
