"""What holds around every call of a layer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from cometrt.errors import CallNotBegun
from cometrt.executor import Executor
from cometrt.types import Arrays
from cometrt.world import World

STOPPED = "the world is stopped until world.reset(): "


class CallScope:
    """Surrounds the calls of one layer on one rank with checks.

    Attributes:
        closed: whether the layer has been closed.
    """

    def __init__(self, world: World) -> None:
        self._world, self.closed = world, False

    @contextlib.contextmanager
    def call(self, name: str) -> Iterator[None]:
        """Around a call: the only one of the world on this rank, of an open layer."""
        outer = self._world.one_call.begin(name)
        try:
            self.check_open()
            yield
        finally:
            self._world.one_call.end(outer)

    def check_open(self) -> None:
        """Raises:
        ValueError: if the layer is closed.
        """
        if self.closed:
            raise ValueError("layer must be open (it was closed)")

    @contextlib.contextmanager
    def exchange(
        self, name: str, arrays: Arrays, executor: Executor, stream: Any
    ) -> Iterator[None]:
        """Around a call that exchanges: on that stream, in a running world. The memory of arrays of
        other libraries is kept until the device has used it. A ValueError names this rank."""
        try:
            outer = self._world.one_call.begin(name)  # `call`, with less time on the host
            try:
                self.check_open()
                with arrays.stream(stream):
                    executor.raise_pending()
                    executor.check_running(STOPPED)
                    try:
                        yield
                    finally:
                        executor.keep_until_done(arrays.take_imported())
            finally:
                self._world.one_call.end(outer)
        except ValueError as error:
            # Only a plain one: others, such as UnicodeError, make their text of several arguments.
            if self._world.size > 1 and type(error) is ValueError:
                error.args = (f"{error} [rank {self._world.rank}]",)
            raise


@contextlib.contextmanager
def filling_nan(*results: Any) -> Iterator[None]:
    """Around a call: if it raises after it has begun, its results become NaN."""
    try:
        yield
    except CallNotBegun as error:
        raise error.reason from None
    except BaseException:
        for result in results:
            # The device may be broken; the first error says why.
            with contextlib.suppress(Exception):
                result.fill(np.nan)
        raise
