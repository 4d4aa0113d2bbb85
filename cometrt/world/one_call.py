"""`OneCall`: rejects a call of a world that overlaps another call of the same rank."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator


class OneCall:
    """The call that is under way on one rank.

    Attributes:
        name: of the call, such as "layer.forward"; "": none.
    """

    def __init__(self) -> None:
        self._lock, self.name = threading.RLock(), ""

    @contextlib.contextmanager
    def hold(self, name: str, *, inner: bool = False) -> Iterator[None]:
        """Mark the call `name` as under way within the context.

        Args:
            inner: whether the call may be part of another call.

        Raises:
            ValueError: if another call is under way; that call is not affected.
        """
        outer = self.begin(name, inner=inner)
        try:
            yield
        finally:
            self.end(outer)

    def begin(self, name: str, *, inner: bool = False) -> str:
        """As `hold`. Returns what `end` must get."""
        if not self._lock.acquire(blocking=False):
            raise self._overlap(name)
        outer = self.name
        if outer and not inner:
            self._lock.release()
            raise self._overlap(name)
        self.name = outer or name
        return outer

    def end(self, outer: str) -> None:
        self.name = outer
        self._lock.release()

    def _overlap(self, name: str) -> ValueError:
        return ValueError(
            f"{name.split('.')[0]} must be called by one thread at a time: calls of a world must "
            f"not overlap ({name}() came during {self.name or 'another call'}())"
        )
