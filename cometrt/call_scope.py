"""What holds around every call of a layer."""

from __future__ import annotations

import contextlib
import sys
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

    def exchange(self, name: str, arrays: Arrays, executor: Executor, stream: Any) -> ExchangeScope:
        """Around a call that exchanges: on that stream, in a running world. The memory of arrays of
        other libraries is kept until the device has used it. A ValueError names this rank."""
        return ExchangeScope(self, self._world, name, arrays, executor, stream)


class ExchangeScope:
    """The context of `CallScope.exchange`. Like the others around each call it is a class: a
    generator takes the host a microsecond more."""

    def __init__(
        self,
        scope: CallScope,
        world: World,
        name: str,
        arrays: Arrays,
        executor: Executor,
        stream: Any,
    ) -> None:
        self._scope, self._world, self._name = scope, world, name
        self._arrays, self._executor, self._stream = arrays, executor, stream

    def __enter__(self) -> None:
        self._outer = self._world.one_call.begin(self._name)
        try:
            self._scope.check_open()
            self._on_stream = self._arrays.stream(self._stream)
            self._on_stream.__enter__()
            try:
                self._executor.raise_pending()
                self._executor.check_running(STOPPED)
            except BaseException:
                self._on_stream.__exit__(*sys.exc_info())
                raise
        except BaseException as error:
            self._world.one_call.end(self._outer)
            self._name_rank(error)
            raise

    def __exit__(self, *raised: Any) -> None:
        try:
            self._executor.keep_until_done(self._arrays.take_imported())
        finally:
            try:
                self._on_stream.__exit__(*raised)
            finally:
                self._world.one_call.end(self._outer)
                self._name_rank(raised[1])

    def _name_rank(self, error: BaseException | None) -> None:
        # Only of a plain ValueError: others, such as UnicodeError, make their text of several
        # arguments.
        if type(error) is ValueError and self._world.size > 1:
            error.args = (f"{error} [rank {self._world.rank}]",)


class FillingNaN:
    """Around a call: if it raises after it has begun, its results become NaN."""

    def __init__(self, *results: Any) -> None:
        self._results = results

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: Any, error: BaseException | None, _traceback: Any) -> None:
        if error is None:
            return
        if isinstance(error, CallNotBegun):
            raise error.reason from None
        for result in self._results:
            # The device may be broken; the first error says why.
            with contextlib.suppress(Exception):
                _fill_nan(result)


def _fill_nan(result: Any) -> None:
    """On a GPU by bytes that are NaN in bfloat16 and float32. A kernel might have to be loaded,
    which waits for the kernels that wait for a peer."""
    if isinstance(result, np.ndarray):
        result.fill(np.nan)
    else:
        result.data.memset_async(0xFF, result.nbytes)
