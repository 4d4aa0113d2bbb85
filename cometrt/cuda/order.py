"""How the calls of a world follow each other, and how ranks of one process keep step."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

from cometrt.cuda.report import report_of, tell_unspecified
from cometrt.errors import CallNotBegun
from cometrt.plan import PlanShape
from cometrt.world import World


class CallOrder:
    """One layer's calls among those of its world.

    Attributes:
        ended: event at the end of the layer's last call.
        captured: memory of calls in CUDA graphs, which outlives them.
        report: the world's.
    """

    def __init__(self, world: World, shape: PlanShape, layer: int) -> None:
        import cupy as cp

        self._cp, self._world, self._layer = cp, world, layer
        self.report = report_of(world)
        self.report.add_layer(layer, shape)
        self.ended = cp.cuda.Event(disable_timing=True)
        self.captured: list[Any] = []

    def synchronize(self) -> None:
        """Wait for this layer's calls; raise what they have not raised yet."""
        self.ended.synchronize()
        self._raise_found()

    def raise_pending(self) -> None:
        """Raise what the device has found wrong so far, without waiting for it. Ranks that are
        threads of one process do so together, where they meet before a call."""
        if not self._world.shares_process:
            self._raise_found()

    def _raise_found(self) -> None:
        error = self.report.error()
        if error is not None:
            raise error

    def keep_for(self, layer: Any, executor: Any) -> weakref.finalize:
        """When the layer is dropped, keep what its queued calls use until they have ended, and what
        its graphs use as long as the world."""
        gpu = self._world.gpu
        assert gpu is not None

        def retire() -> None:
            executor.give_up()
            gpu.retire(executor, None if self.captured else self.ended)

        finalizer = weakref.finalize(layer, retire)
        finalizer.atexit = False
        return finalizer

    @contextlib.contextmanager
    def guard(self, operation: str, capturing: bool) -> Iterator[None]:
        """Around all of a call: stops the world if this rank raises what its peers do not know of,
        also before anything is launched, since they wait for it. While a graph is captured they do
        not."""
        try:
            yield
        except CallNotBegun:
            raise
        except BaseException as error:
            if operation == "backward":
                tell_unspecified(error)
            if not self._world.stopped and not capturing:
                self._world.stop_for(error, f" in a {operation} of layer {self._layer}")
            raise

    @contextlib.contextmanager
    def launching(self, capturing: bool, buffers: tuple[Any, ...] = ()) -> Iterator[None]:
        """Around a call's launches: calls of a world follow each other, whatever their streams.

        Not so in a graph: its owner orders replays, and `buffers` are kept for them."""
        gpu, stream = self._world.gpu, self._cp.cuda.get_current_stream()
        assert gpu is not None
        if capturing:
            gpu.captured = True
            yield
            self.captured.append(buffers)
            return
        self._begin()
        if gpu.last_call is not None:
            stream.wait_event(gpu.last_call)
        try:
            yield
        finally:  # what was launched before an error runs on
            self.ended.record(stream)
            gpu.last_call = self.ended
        self.meet()

    def _begin(self) -> None:
        """Ranks that are threads of one process meet, and raise together what one of them has found
        on its device: all find the same."""
        world, report = self._world, self.report
        if not world.shares_process:
            return
        if report.kind not in ("", "routing"):
            self._raise_not_begun()
        kinds = world.allgather(report.kind, purpose="a call")
        if "routing" in kinds and world.gpu is not None and world.gpu.last_call is not None:
            world.gpu.last_call.synchronize()
            self._raise_not_begun()

    def _raise_not_begun(self) -> None:
        error = self.report.error()
        if error is not None:
            raise CallNotBegun(error)

    def meet(self) -> None:
        """Where ranks are threads of one process, they meet before a call, after it, and before
        what waits for a peer and comes after something that may wait for the whole device
        (allocate, load a kernel): that could hold up a kernel that a peer's kernel waits for. On
        GPUs of their own too: CUDA calls of one process wait for each other, and memory that
        peers reach is given back only when they rest."""
        if self._world.shares_process:
            self._world.allgather(None, purpose="a call")
