"""`LayerLife`: what a layer offers besides its calls, from its making to its end."""

from __future__ import annotations

import contextlib
from typing import Any

from cometrt.call_scope import STOPPED, CallScope
from cometrt.closing import Closing
from cometrt.executor import Executor
from cometrt.stats import LayerStats
from cometrt.trace import Recording
from cometrt.types import Arrays
from cometrt.world import World


class LayerLife(Closing):
    """Base of `MoELayer`, which makes the attributes.

    Attributes:
        world: the layer's.
        executor: for tests and benchmarks: it may change with any version.
    """

    world: World
    executor: Executor
    _arrays: Arrays
    _scope: CallScope

    def buffer(self) -> Any:
        """Heap memory [max_tokens, H]: tokens written here and passed as ``x = buffer()[:T]``
        are not copied, until another layer of the world is made. Its contents are valid until the
        next call of any layer, but for `plan`. The memory stays as long as a view of it, also when
        the world has closed."""
        with self._scope.call("layer.buffer"):
            self.world.check_running(STOPPED)
            return self.executor.buffer()

    def stats(self) -> LayerStats | None:
        """Of the newest call that has succeeded, read without a wait; None: there is none yet."""
        self._scope.check_open()
        return self.executor.stats()

    def recorded_by(self, recording: Recording) -> contextlib.AbstractContextManager[None]:
        """For `cometrt.trace.record`: within it, what runs on the device is recorded too."""
        self._scope.check_open()
        return self.executor.recorded_by(recording)

    def synchronize(self) -> None:
        """Wait for the calls of all layers of the world, and raise what they have not raised yet.
        On the host every call has ended, and has raised, when it returns."""
        with self._scope.call("layer.synchronize"):
            self._synchronize()

    def _synchronize(self) -> None:
        with self._arrays.stream(None):
            self.executor.synchronize()
            self.executor.check_running(STOPPED)

    def close(self) -> None:
        """Give this layer up, on this rank; may be repeated. Raises what `synchronize` would. The
        memory that only it needed is given back when the next layer is made."""
        if not self._scope.closed:
            with self._scope.call("layer.close"):
                self._scope.closed = True
                self.executor.close()

    def abandon(self, error: BaseException) -> None:
        """As `close`, because of `error`: it neither waits nor raises."""
        if not self._scope.closed:
            self._scope.closed = True
            self.executor.give_up()
