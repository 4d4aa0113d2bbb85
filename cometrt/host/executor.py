"""Forward and backward of one layer on the host: which phase each role runs, over what."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import numpy as np

from cometrt.buffers import plan_rows
from cometrt.heap import SymmetricHeap
from cometrt.host import comm, compute
from cometrt.host.buffers import backward_rows, empty, wide_weights
from cometrt.host.exchange import Exchange
from cometrt.plan import Plan, PlanShape
from cometrt.plan.reference import make_plan
from cometrt.residuals import Residuals
from cometrt.specs import Gradients
from cometrt.trace import Recording, Tracer
from cometrt.world import World


class HostExecutor:
    """mode "fused": both roles at once. "sequential": dispatch, GEMMs, combine, one after the
    other; the same bits."""

    def __init__(self, world: World, shape: PlanShape, layer: int, mode: str) -> None:
        """Collective."""
        self._world, self._shape, self._layer = world, shape, layer
        self.num_tables = len(dataclasses.fields(Plan))  # of a plan, in `saved`
        self._overlapped = mode == "fused"
        self._heap = SymmetricHeap(world, shape)
        self.generation = 0  # a forward that has returned has its backward, also after a reset

    def buffer(self) -> np.ndarray:
        return self._heap.array("x")

    def buffer_place(self) -> tuple[int, int]:
        """Addresses [begin, end) of this rank's heap of rows, which begins with `buffer`."""
        return self._heap.rows_place(self.buffer().ctypes.data)

    def forward(
        self,
        x: np.ndarray,
        ids: np.ndarray,
        weights: np.ndarray,
        w_up: np.ndarray,
        w_down: np.ndarray,
        *,
        training: bool,
        out: np.ndarray,
        tracer: Tracer,
    ) -> dict[str, Any] | None:
        """Returns the residuals that backward needs, but for the weights."""
        ex = Exchange(self._world, self._heap, self._shape, self._layer, tracer)
        with ex.guard("compute"):
            return self._forward(ex, x, ids, weights, w_up, w_down, training, out)

    def _forward(
        self,
        ex: Exchange,
        x: np.ndarray,
        ids: np.ndarray,
        weights: np.ndarray,
        w_up: np.ndarray,
        w_down: np.ndarray,
        training: bool,
        out: np.ndarray,
    ) -> dict[str, Any] | None:
        num_tokens = ex.publish("forward", {"x": x}, len(x), ids=ids, weights=weights)
        with ex.step("compute", "plan"):
            ex.plan = make_plan(ex.read_routing(num_tokens), self._shape)
        pulls_again = training and self._shape.geometry.spec.save == "z"
        tokens = self._own_tokens(x) if pulls_again else None  # now: `out` may be x itself
        x_rows, z, a, o = empty(plan_rows(self._shape))
        up, down = compute.ExpertWeights(w_up), compute.ExpertWeights(w_down)
        ex.run(
            [
                ("comm", lambda: comm.pull_rows(ex, "x", x_rows)),
                ("compute", lambda: compute.up_tiles(ex, x_rows, up, z, a)),
                ("compute", lambda: compute.down_tiles(ex, a, down, o)),
                ("comm", lambda: comm.combine(ex, o, out, weighted=True)),
            ],
            overlapped=self._overlapped,
        )
        if not training:
            return None
        return {
            "epoch": np.array([ex.epoch], np.int64),
            "x": x_rows if tokens is None else tokens,
            "z": z,
            "tables": ex.plan.arrays(),
        }

    def backward(
        self, dy: np.ndarray, saved: Residuals, *, out: Gradients, accumulate: bool, tracer: Tracer
    ) -> None:
        """Fill `out`; weight gradients only once the exchange has succeeded."""
        ex = Exchange(self._world, self._heap, self._shape, self._layer, tracer)
        w_up, w_down = empty(wide_weights(self._shape))
        wide = out._replace(w_up=w_up, w_down=w_down)
        with ex.guard("compute"):
            self._backward(ex, dy, saved, wide)
        for result, value in ((out.w_up, wide.w_up), (out.w_down, wide.w_down)):
            result[:] = result + value if accumulate else value

    def recorded_by(self, recording: Recording) -> contextlib.AbstractContextManager[None]:
        """Nothing: spans are told as they end."""
        return contextlib.nullcontext()

    def keep_for(self, layer: Any) -> None:
        """A call that has returned uses nothing."""

    def raise_pending(self) -> None:
        """Nothing: a call has raised what it has to when it returns."""

    def check_running(self, prefix: str) -> None:
        """As `World.check_running`."""
        self._world.check_running(prefix)

    def stop_world(self, error: BaseException, operation: str) -> None:
        """This rank raises what its peers do not know of."""
        self._world.stop_for(error, f" in a {operation} of layer {self._layer}")

    def synchronize(self) -> None:
        """Every call has ended, and has raised, when it returns."""

    def close(self) -> None:
        self._heap.close()

    def give_up(self) -> None:
        """As `close`, without raising what calls have found."""
        self._heap.close()

    def _backward(self, ex: Exchange, dy: np.ndarray, saved: Residuals, out: Gradients) -> None:
        ex.plan, pull_x = Plan(*saved.tables), self._shape.geometry.spec.save == "z"
        payloads = {"dy": dy} | ({"x": saved.x[: len(dy)]} if pull_x else {})
        comm.clear_dweight(ex, len(dy))
        ex.publish("backward", payloads, len(dy), forward_epoch=int(saved.epoch[0]))
        dy_rows, dx_rows, dz, weighted_a, dweight_rows, *again = empty(backward_rows(self._shape))
        x_rows = again[0] if pull_x else saved.x
        up, down = compute.ExpertWeights(saved.w_up), compute.ExpertWeights(saved.w_down)
        z = saved.z

        def pull() -> None:
            comm.pull_rows(ex, "dy", dy_rows)
            if pull_x:  # before the last partial of dx leaves: then the home may overwrite x
                comm.pull_rows(ex, "x", x_rows)

        def down_dgrad() -> None:
            compute.down_dgrad_tiles(ex, dy_rows, down, z, dz, weighted_a, dweight_rows)

        def wgrad() -> None:
            compute.wgrad_tiles(ex, dz, x_rows, dy_rows, weighted_a, out.w_up, out.w_down)

        def combine() -> None:
            comm.combine(ex, dx_rows, out.x, weighted=False, dweight_rows=dweight_rows)

        ex.run(
            [
                ("comm", pull),
                ("compute", down_dgrad),
                ("compute", lambda: compute.up_dgrad_tiles(ex, dz, up, dx_rows)),
                ("compute", wgrad),
                ("comm", combine),
            ],
            overlapped=self._overlapped,
        )
        out.topk_weights[:] = comm.gather_dweight(ex, len(dy))

    def _own_tokens(self, x: np.ndarray) -> np.ndarray:
        """A copy of x in the fixed shape [max_tokens, H]."""
        spec = self._shape.geometry.spec
        copy = np.zeros((spec.max_tokens, spec.hidden), spec.numpy_dtype)
        copy[: len(x)] = x
        return copy
