"""The order of a world's calls on the device, and where ranks of one process meet."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from typing import Any

from cometrt.cuda.report import report_of, tell_unspecified
from cometrt.errors import CallNotBegun, CometError
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
        self._last_operation = ""

    def synchronize(self) -> None:
        """Wait for all calls of the world; raise what they have not raised yet."""
        self._wait_for_calls()
        self._raise_found()

    def raise_pending(self) -> None:
        """Raise what the device has found wrong so far, without waiting for it. Ranks that are
        threads of one process raise together, in the meeting before a call. A stream that is being
        captured raises nothing."""
        if not self.report.has_found:
            return
        if self._world.shares_process and self.report.kind != "stopped":
            return
        if not self._cp.cuda.get_current_stream().is_capturing():
            self._raise_found()

    def check_running(self, prefix: str) -> None:
        """As `World.check_running`."""
        try:
            self._world.check_running(prefix)
        except CometError as error:
            if self._last_operation == "backward":
                tell_unspecified(error)
            raise

    def _wait_for_calls(self) -> None:
        gpu = self._world.gpu
        if gpu is not None and gpu.last_call is not None:
            gpu.last_call.synchronize()

    def _raise_found(self) -> None:
        error = self.report.error()
        if error is not None:
            raise error

    def keep_for(self, layer: Any, executor: Any) -> weakref.finalize:
        """Once the layer is dropped, keep the memory of its queued calls until they have ended, and
        the memory of its graphs as long as the world."""

        def drop() -> None:
            executor.give_up()
            self.retire(executor)

        finalizer = weakref.finalize(layer, drop)
        finalizer.atexit = False
        return finalizer

    def keep_until_done(self, arrays: list[Any]) -> None:
        """Keep arrays until what is queued on the current stream has ended; those of a captured
        call as long as the world."""
        stream, gpu = self._cp.cuda.get_current_stream(), self._world.gpu
        assert gpu is not None
        if stream.is_capturing():
            self.captured.append(arrays)
            return
        event = self._cp.cuda.Event(disable_timing=True)
        event.record(stream)
        gpu.retire(arrays, event)

    def retire(self, executor: Any) -> None:
        """Keep the memory of its queued calls until they have ended."""
        gpu = self._world.gpu
        assert gpu is not None
        gpu.retire(executor, None if self.captured else self.ended)

    def guard(self, operation: str) -> Guard:
        """Around all of a call: stops the world if this rank raises, also before a launch."""
        return Guard(self, operation)

    def stop_world(self, error: BaseException, operation: str) -> None:
        """End the wait of peers for this rank, which raises in a call. Nothing is done where the
        error came from them, or where this rank captures a graph."""
        capturing = False
        with contextlib.suppress(Exception):  # of a broken device
            capturing = bool(self._cp.cuda.get_current_stream().is_capturing())
        if not capturing and not self._world.stopped:
            self._world.stop_for(error, f" in a {operation} of layer {self._layer}")

    def launch_captured(self, launch: Callable[[], object], buffers: Any) -> None:
        """Launch a call into a graph of the caller's, whose owner orders the replays. `buffers` are
        kept for them."""
        gpu = self._world.gpu
        assert gpu is not None
        gpu.captured = True
        launch()
        self.captured.append(buffers)

    def launch(self, operation: str, stream: Any, launch: Callable[[], object]) -> None:
        """Launch a call on CuPy's current stream. The calls of a world run one after the other, on
        any streams."""
        gpu = self._world.gpu
        assert gpu is not None
        self._begin()
        self._last_operation = operation
        if gpu.last_call is not None:
            stream.wait_event(gpu.last_call)
        try:
            launch()
        finally:  # launches before an error still run
            self.ended.record(stream)
            gpu.last_call = self.ended
        self.meet()

    def _begin(self) -> None:
        """Ranks that are threads of one process meet. If one of them has found an error on its
        device, all raise: an error that does not stop the world is found by all, at its own time.
        """
        world, report = self._world, self.report
        if not world.shares_process:
            return
        kinds = world.allgather(report.kind, purpose="the start of a call")
        if not any(kinds):
            return
        self._wait_for_calls()
        self._cp.cuda.get_current_stream().synchronize()
        error = report.error()
        if error is None:
            rank, kind = next((rank, kind) for rank, kind in enumerate(kinds) if kind)
            error = CometError(
                f"an earlier call failed on rank {rank} ({kind}), and not on this one"
            )
            error.relayed = True
        raise CallNotBegun(error)

    def meet(self) -> None:
        """Ranks that are threads of one process meet: before and after each call, and before a
        launch that waits for a peer if the host has done something that may wait for the device
        (allocating, loading a kernel). Otherwise it could wait for a kernel that waits for this
        rank. This holds on GPUs of their own too: CUDA calls of one process wait for each other,
        and memory that peers reach is freed only while they are idle."""
        if self._world.shares_process:
            self._world.allgather(None, purpose="the end of a call")


class Guard:
    """The context of `CallOrder.guard`."""

    def __init__(self, order: CallOrder, operation: str) -> None:
        self._order, self._operation = order, operation

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: Any, error: BaseException | None, _traceback: Any) -> None:
        if error is None or isinstance(error, CallNotBegun):
            return
        if self._operation == "backward":
            tell_unspecified(error)
        self._order.stop_world(error, self._operation)
