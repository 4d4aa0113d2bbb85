"""`Executor`: what `MoELayer` needs of the executor of a device."""

from __future__ import annotations

import contextlib
from typing import Any, Protocol

from cometrt.plan_ahead import PlanAhead
from cometrt.residuals import Residuals
from cometrt.specs import Gradients
from cometrt.stats import LayerStats
from cometrt.trace import Recording, Tracer


class Executor(Protocol):
    """Runs the calls of one layer on one rank: `HostExecutor` or `CudaExecutor`.

    Arrays are of the device's array type, and checked.
    """

    captured: list[Any]  # memory of calls in CUDA graphs

    @property
    def generation(self) -> int:
        """`saved` is valid for backward while this value is the one at its forward."""
        ...

    def buffer(self) -> Any:
        """The heap array x [max_tokens, H] of this rank."""
        ...

    def buffer_range(self) -> tuple[int, int]:
        """Addresses [begin, end) of this rank's region "data", which begins with `buffer()`."""
        ...

    def forward(
        self,
        x: Any,
        ids: Any,
        weights: Any,
        w_up: Any,
        w_down: Any,
        *,
        training: bool,
        out: Any,
        tracer: Tracer,
        plan: PlanAhead | None = None,
    ) -> dict[str, Any] | None:
        """Fill `out`. In training: epoch, x, z (or None) and tables of `Residuals`. With a plan
        ids and weights are None."""
        ...

    def plan(self, ids: Any, weights: Any, *, tracer: Tracer) -> dict[str, Any]:
        """epoch and tables of `PlanAhead`."""
        ...

    def backward(
        self, dy: Any, saved: Residuals, *, out: Gradients, accumulate: bool, tracer: Tracer
    ) -> None:
        """Fill `out`."""
        ...

    def keep_until_done(self, arrays: list[Any]) -> None:
        """Keep arrays until what is queued on the current stream has ended."""
        ...

    def keep_for(self, layer: Any) -> Any:
        """Keep the memory of running kernels if the layer is dropped; its finalizer, or None."""
        ...

    def recorded_by(self, recording: Recording) -> contextlib.AbstractContextManager[None]:
        """Record events of the device's kernels within the context."""
        ...

    def stats(self) -> LayerStats | None:
        """Of the newest call that has succeeded, read without a wait; None: there is none yet."""
        ...

    def synchronize(self) -> None:
        """Wait for all calls of the world, and raise the errors that they have not raised yet."""
        ...

    def raise_pending(self) -> None:
        """Raise the errors of calls that have ended and have not raised yet."""
        ...

    def check_running(self, prefix: str) -> None:
        """As `World.check_running`, also for failures that only the device knows of."""
        ...

    def stop_world(self, error: BaseException, operation: str) -> None:
        """Stop the world because of an error outside of an exchange."""
        ...

    def close(self) -> None:
        """End the layer's part on this rank. Raises what `synchronize` would."""
        ...

    def give_up(self) -> None:
        """As `close`, after an error: neither waits nor raises."""
        ...
