"""`NodesExecutor`: what the executors over several nodes have in common on both devices."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from cometrt.errors import CallNotBegun, CapacityError, CometError
from cometrt.executor import Executor
from cometrt.nodes.slices import RailSlices
from cometrt.plan import PlanShape
from cometrt.plan.reference import too_many_rows
from cometrt.specs import MoESpec
from cometrt.stats import LayerStats
from cometrt.trace import Recording
from cometrt.world.nodes import NodesWorld


class NodesExecutor:
    """A layer on one rank of several nodes.

    Attributes:
        inner: the executor of the layer within the node.
        captured: memory of calls in CUDA graphs.
    """

    inner: Executor
    # What a call raises on all ranks, or after the world has stopped.
    known: tuple[type[BaseException], ...] = (CometError, CallNotBegun)

    def __init__(
        self,
        world: NodesWorld,
        spec: MoESpec,
        shape: PlanShape,
        slices: RailSlices,
        layer: int,
        make: Callable[[], Executor],
    ) -> None:
        """Collective.

        Args:
            spec: of the layer.
            shape: of the layer within the node.
            slices: of the layer's calls.
            make: makes the executor of that layer.
        """
        self._world, self._spec, self._shape, self._layer = world, spec, shape, layer
        self._slices = slices
        with self._following():
            self.inner = make()
        self.captured = self.inner.captured
        world.barrier()

    @contextlib.contextmanager
    def _following(self) -> Iterator[None]:
        """A failure of the node stops the world."""
        try:
            yield
        except BaseException:
            self._world.follow()
            raise

    @contextlib.contextmanager
    def _guard(self, operation: str) -> Iterator[None]:
        """Around a call: what this rank raises stops the world, unless all ranks raise it."""
        try:
            with self._following():
                yield
        except self.known:
            raise
        except BaseException as error:
            self.stop_world(error, operation)
            raise

    @property
    def generation(self) -> int:
        return self.inner.generation

    def too_many_rows(self, rank: int, rows: int) -> CapacityError:
        """The CapacityError of a slice for which that rank of all nodes needs so many rows."""
        return too_many_rows(rank, rows, self._shape, self._spec.capacity_factor)

    def keep_until_done(self, arrays: list[Any]) -> None:
        self.inner.keep_until_done(arrays)

    def keep_for(self, layer: Any) -> Any:
        return self.inner.keep_for(layer)

    def recorded_by(self, recording: Recording) -> contextlib.AbstractContextManager[None]:
        return self.inner.recorded_by(recording)

    def stats(self) -> LayerStats | None:
        return self.inner.stats()

    def synchronize(self) -> None:
        with self._following():
            self.inner.synchronize()

    def raise_pending(self) -> None:
        with self._following():
            self.inner.raise_pending()

    def check_running(self, prefix: str = "") -> None:
        self._world.check_running(prefix)
        with self._following():
            self.inner.check_running(prefix)

    def stop_world(self, error: BaseException, operation: str) -> None:
        if not self._world.is_stopped:
            self._world.stop_for(error, f" in a {operation} of layer {self._layer}")

    def close(self) -> None:
        try:
            self.synchronize()
        finally:
            self.give_up()

    def give_up(self) -> None:
        self.inner.give_up()
