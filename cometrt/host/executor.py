"""Forward and backward of one layer on the host: memory of its calls, and the stages of each.

A call has the steps of one on "cuda": begin, publish, plan, path, finish. A path is a list of
stages, each of one of the two roles.
"""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np

from cometrt.buffers import plan_rows
from cometrt.heap import SymmetricHeap
from cometrt.host import comm, compute
from cometrt.host.buffers import backward_rows, empty, wide_weights
from cometrt.host.exchange import Exchange, Stage
from cometrt.plan import Plan, PlanShape
from cometrt.plan.reference import make_plan
from cometrt.plan_ahead import PlanAhead
from cometrt.residuals import Residuals
from cometrt.specs import Gradients
from cometrt.stats import LayerStats, rows_of_experts
from cometrt.trace import Recording, Tracer
from cometrt.world import World

Arrays = dict[str, np.ndarray]


class HostExecutor:
    """Runs a layer's calls. mode "fused": both roles at the same time. "sequential": all stages one
    after the other, with the same bits."""

    generation = 0  # a forward that has returned is valid, also after a reset

    def __init__(self, world: World, shape: PlanShape, layer: int, mode: str) -> None:
        """Collective."""
        self._world, self._shape, self._layer = world, shape, layer
        self._overlapped = mode == "fused"
        self.captured: list[Any] = []  # the host has no CUDA graphs
        self._heap = SymmetricHeap(world, shape)
        self._save = shape.geometry.spec.save
        self._stats: LayerStats | None = None

    def buffer(self) -> np.ndarray:
        return self._heap.array("x")

    def buffer_range(self) -> tuple[int, int]:
        """Addresses [begin, end) of this rank's heap of rows, which begins with `buffer`."""
        return self._heap.rows_place(self.buffer().ctypes.data)

    def forward(
        self,
        x: np.ndarray,
        ids: np.ndarray | None,
        weights: np.ndarray | None,
        w_up: np.ndarray,
        w_down: np.ndarray,
        *,
        training: bool,
        out: np.ndarray,
        tracer: Tracer,
        plan: PlanAhead | None = None,
    ) -> dict[str, Any] | None:
        """Returns the residuals that backward needs, but for the weights."""
        ex = Exchange(self._world, self._heap, self._shape, self._layer, tracer)
        with ex.guard("compute"):
            if plan is None:
                num_tokens = ex.publish("forward", {"x": x}, len(x), ids=ids, weights=weights)
                self._make_plan(ex, num_tokens)
            else:
                of_plan = int(plan.epoch[0])
                ex.publish("planned forward", {"x": x}, len(x), forward_epoch=of_plan)
                ex.plan = Plan(*plan.tables)
            rows = empty(plan_rows(self._shape))
            kept = {"x": rows["x"]}
            if training and self._save != "rows":  # now: `out` may be x itself
                kept = {"x": self._own_tokens(x)}
            arrays = {"w_up": w_up, "w_down": w_down, "out": out} | rows
            ex.run(forward_path(ex, arrays), overlapped=self._overlapped)
        self._keep_stats(ex)
        if not training:
            return None
        epoch = np.array([ex.epoch], np.int64)
        z = None if self._save == "nothing" else rows["z"]
        return kept | {"epoch": epoch, "z": z, "tables": ex.plan.arrays()}

    def plan(self, ids: np.ndarray, weights: np.ndarray, *, tracer: Tracer) -> dict[str, Any]:
        """An exchange of ids and weights alone: each rank makes its plan, and moves no row."""
        ex = Exchange(self._world, self._heap, self._shape, self._layer, tracer)
        with ex.guard("compute"):
            self._make_plan(ex, ex.publish("plan", {}, len(ids), ids=ids, weights=weights))
            ex.run([], overlapped=False)
        self._keep_stats(ex)
        return {"epoch": np.array([ex.epoch], np.int64), "tables": ex.plan.arrays()}

    def _make_plan(self, ex: Exchange, num_tokens: list[int]) -> None:
        with ex.step("compute", "plan"):
            ex.plan = make_plan(ex.read_routing(num_tokens), self._shape)

    def backward(
        self, dy: np.ndarray, saved: Residuals, *, out: Gradients, accumulate: bool, tracer: Tracer
    ) -> None:
        """Fill `out`; weight gradients only once the exchange has succeeded."""
        shape = self._shape.of_backward()
        ex = Exchange(self._world, self._heap, shape, self._layer, tracer)
        with ex.guard("compute"):
            wide = empty(wide_weights(self._shape))
            payloads = {"dy": dy}
            arrays = empty(backward_rows(self._shape))
            if self._save == "rows":
                arrays["x_rows"] = saved.x
            else:
                payloads["x"] = saved.x[: len(dy)]
            comm.clear_dweight(ex, len(dy))
            ex.publish("backward", payloads, len(dy), forward_epoch=int(saved.epoch[0]))
            ex.plan = Plan(*saved.tables)
            if self._save == "nothing":  # the down dgrad reads z before it writes dz there
                arrays |= {"z": arrays["dz"], "a": arrays["weighted_a"]}
            else:
                arrays["z"] = saved.z
            arrays |= {"w_up": saved.w_up, "w_down": saved.w_down, "out": out.x}
            arrays |= {"dw_up": wide["w_up"], "dw_down": wide["w_down"]}
            ex.run(backward_path(ex, arrays), overlapped=self._overlapped)
            out.topk_weights[:] = comm.gather_dweight(ex, len(dy))
        for result, value in ((out.w_up, wide["w_up"]), (out.w_down, wide["w_down"])):
            result[:] = result + value if accumulate else value
        self._keep_stats(ex)

    def _keep_stats(self, ex: Exchange) -> None:
        waited_us = ex.waited_us if ex.waited_us >= 1 else 0.0
        rows = rows_of_experts(ex.plan.expert_rows, self._shape.geometry.row_sets)
        self._stats = LayerStats(ex.epoch, rows, waited_us, ex.rows_waited_us)

    def stats(self) -> LayerStats | None:
        return self._stats

    def _own_tokens(self, x: np.ndarray) -> np.ndarray:
        """A copy of x in the fixed shape [max_tokens, H]."""
        spec = self._shape.geometry.spec
        copy = np.zeros((spec.max_tokens, spec.hidden), spec.numpy_dtype)
        copy[: len(x)] = x
        return copy

    def recorded_by(self, recording: Recording) -> contextlib.AbstractContextManager[None]:
        """Does nothing: the tracer gets each span at its end."""
        return contextlib.nullcontext()

    def keep_until_done(self, arrays: list[Any]) -> None:
        """Does nothing: a call that has returned uses no memory."""

    def keep_for(self, layer: Any) -> None:
        """Does nothing: a call that has returned uses no memory."""

    def raise_pending(self) -> None:
        """Does nothing: a call raises its error before it returns."""

    def check_running(self, prefix: str) -> None:
        """As `World.check_running`."""
        self._world.check_running(prefix)

    def stop_world(self, error: BaseException, operation: str) -> None:
        """Stop the world for an error that only this rank knows."""
        self._world.stop_for(error, f" in a {operation} of layer {self._layer}")

    def synchronize(self) -> None:
        """Does nothing: a call has ended when it returns."""

    def close(self) -> None:
        self._heap.close()

    def give_up(self) -> None:
        """As `close`, without raising the errors of calls."""
        self._heap.close()


def forward_path(ex: Exchange, arrays: Arrays) -> list[Stage]:
    """arrays: x, z, a, o of the plan's rows; w_up, w_down; out."""
    up, down = (compute.ExpertWeights(arrays[name]) for name in ("w_up", "w_down"))
    x, z, a, o = (arrays[name] for name in ("x", "z", "a", "o"))
    return [
        ("comm", lambda: comm.pull_rows(ex, "x", x)),
        ("compute", lambda: compute.up_tiles(ex, x, up, z, a)),
        ("compute", lambda: compute.down_tiles(ex, a, down, o)),
        ("comm", lambda: comm.combine(ex, o, arrays["out"], weighted=True)),
    ]


def backward_path(ex: Exchange, arrays: Arrays) -> list[Stage]:
    """arrays: of `backward_rows`; x_rows, z; w_up, w_down; out, dw_up, dw_down. With
    save="nothing" also a, for what is computed again.

    x is pulled before the last partial row of dx leaves. Then its home may overwrite it.
    """
    up, down = (compute.ExpertWeights(arrays[name]) for name in ("w_up", "w_down"))
    dy_rows, dz, x_rows = (arrays[name] for name in ("dy_rows", "dz", "x_rows"))
    weighted_a, dweight_rows = arrays["weighted_a"], arrays["dweight_rows"]
    save = ex.shape.geometry.spec.save

    def pull() -> None:
        # The rows that the first GEMM needs come first.
        for name in {"rows": ("dy",), "z": ("dy", "x"), "nothing": ("x", "dy")}[save]:
            comm.pull_rows(ex, name, arrays[f"{name}_rows"])

    def recompute() -> None:
        if save == "nothing":
            compute.up_tiles(ex, x_rows, up, arrays["z"], arrays["a"])

    def down_dgrad() -> None:
        compute.down_dgrad_tiles(ex, dy_rows, down, arrays["z"], dz, weighted_a, dweight_rows)

    def wgrad() -> None:
        gradients = arrays["dw_up"], arrays["dw_down"]
        compute.wgrad_tiles(ex, dz, x_rows, dy_rows, weighted_a, *gradients)

    def combine() -> None:
        rows, out = arrays["dx_rows"], arrays["out"]
        comm.combine(ex, rows, out, weighted=False, dweight_rows=dweight_rows)

    return [
        ("comm", pull),
        ("compute", recompute),
        ("compute", down_dgrad),
        ("compute", lambda: compute.up_dgrad_tiles(ex, dz, up, arrays["dx_rows"])),
        ("compute", wgrad),
        ("comm", combine),
    ]
