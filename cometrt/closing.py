"""`Closing`: what `with` closes at its end."""

from __future__ import annotations

import abc
from types import TracebackType
from typing import Self


class Closing(abc.ABC):
    """Base of what all ranks close together. Where `with` ends by an error, the other ranks may not
    come: then `abandon` ends it on this rank."""

    @abc.abstractmethod
    def close(self) -> None: ...

    @abc.abstractmethod
    def abandon(self, error: BaseException) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
        else:
            self.abandon(error)
