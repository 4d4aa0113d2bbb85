"""Calls over several nodes on CUDA: NCCL is the rail. All of a call is on one stream."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from cometrt.cuda.executor import CudaExecutor
from cometrt.cuda.types import DeviceArray
from cometrt.errors import CallNotBegun, CapacityError, CometError, RoutingError
from cometrt.nodes.cuda_rail import OUTCOMES, CudaRail
from cometrt.nodes.executor import NodesExecutor
from cometrt.plan import PlanShape
from cometrt.plan.reference import too_many_rows
from cometrt.plan_ahead import PlanAhead
from cometrt.residuals import Residuals
from cometrt.specs import Geometry, Gradients, MoESpec
from cometrt.trace import Tracer
from cometrt.world.failure import Failure
from cometrt.world.nodes import NodesWorld

_NEWS_SEC = 1.0  # the time in which another node's failure becomes known here


class CudaNodesExecutor(NodesExecutor):
    """Queues a layer's calls: rail, the node's layer, rail."""

    inner: CudaExecutor
    known = (CallNotBegun,)  # what all ranks raise comes later

    def __init__(
        self, world: NodesWorld, spec: MoESpec, shape: PlanShape, layer: int, mode: str
    ) -> None:
        """Collective. `shape`: of the layer within the node."""
        import cupy as cp

        self._cp, self._generation = cp, world.generation
        super().__init__(
            world, spec, shape, layer, lambda: CudaExecutor(world.node, shape, layer, mode)
        )
        self.rail = CudaRail(world, spec, layer, self.inner)
        cp.cuda.get_current_stream().synchronize()
        world.barrier()

    def forward(
        self,
        x: DeviceArray,
        ids: DeviceArray | None,
        weights: DeviceArray | None,
        w_up: DeviceArray,
        w_down: DeviceArray,
        *,
        training: bool,
        out: DeviceArray,
        tracer: Tracer,
        plan: PlanAhead | None = None,
    ) -> dict[str, Any] | None:
        with self._call("forward"):
            rail, all_x = self.rail, self.inner.buffer()
            tables: tuple[Any, Any] = (None, None)
            if plan is None:
                rail.gather("forward", len(x), x, all_x, ids, weights)
                tables = rail.all_ids, rail.all_weights
            else:
                epoch = plan.epoch
                rail.gather("planned forward", len(x), x, all_x, forward_epoch=epoch)
            kept = self.inner.forward(
                all_x,
                tables[0],
                tables[1],
                w_up,
                w_down,
                training=training,
                out=rail.results,
                tracer=tracer,
                plan=plan,
            )
            rail.send_back(out)
        return kept

    def plan(self, ids: DeviceArray, weights: DeviceArray, *, tracer: Tracer) -> dict[str, Any]:
        with self._call("plan"):
            rail = self.rail
            rail.gather("plan", len(ids), ids=ids, weights=weights)
            made = self.inner.plan(rail.all_ids, rail.all_weights, tracer=tracer)
            rail.send_back()
        return made

    def backward(
        self,
        dy: DeviceArray,
        saved: Residuals,
        *,
        out: Gradients,
        accumulate: bool,
        tracer: Tracer,
    ) -> None:
        with self._call("backward"):
            rail = self.rail
            rail.gather("backward", len(dy), dy, rail.rows, forward_epoch=saved.epoch)
            grads = Gradients(rail.results, rail.dweights, out.w_up, out.w_down)
            self.inner.backward(rail.rows, saved, out=grads, accumulate=accumulate, tracer=tracer)
            rail.send_back(out.x, out.topk_weights)

    @contextlib.contextmanager
    def _call(self, operation: str) -> Iterator[None]:
        """Around a call: it follows the world's calls before it, on any streams."""
        self.inner.check_capture(operation)
        self._world.next_epoch()
        gpu, stream = self._world.node.gpu, self._cp.cuda.get_current_stream()
        assert gpu is not None
        capturing = bool(stream.is_capturing())
        if not capturing and gpu.last_call is not None:
            stream.wait_event(gpu.last_call)
        try:
            with self._guard(operation):
                yield
        finally:
            if capturing:
                gpu.captured = True
            else:
                self.inner.ended.record(stream)
                gpu.last_call = self.inner.ended

    def keep_for(self, layer: Any) -> Any:
        self.inner.rail = self.rail  # lives as long as the queued calls of a dropped layer
        return self.inner.keep_for(layer)

    def synchronize(self) -> None:
        with self._numbered():
            super().synchronize()
        self._raise_other_nodes()

    def raise_pending(self) -> None:
        with self._numbered():
            super().raise_pending()
        self._raise_other_nodes()

    def _raise_other_nodes(self) -> None:
        """Raise the error of a call that failed on another node alone."""
        report, world = self.rail.report[0], self._world
        if world.generation != self._generation:  # what was reported before `reset`
            self._generation, report["kind"] = world.generation, 0
        kind = OUTCOMES[int(report["kind"])]
        if not kind or self._cp.cuda.get_current_stream().is_capturing():
            return
        node, packed = int(report["node"]), int(report["largest_need"])
        report["kind"] = 0
        if kind == "failed" and packed not in (0, 2**64 - 1):
            rank = node * world.ranks_per_node + 0xFFFF - (packed & 0xFFFF)
            raise self._too_many_rows(rank, packed >> 16)
        if kind == "failed":
            raise CometError(
                f"a call did nothing on node {node}: its forward or its plan failed there, or was "
                f"queued behind a call that did"
            )
        deadline = time.monotonic() + _NEWS_SEC
        while not world.stopped and time.monotonic() < deadline:
            time.sleep(1e-3)
        if not world.is_stopped:
            text = f"the world has stopped on node {node}"
            world.stop(Failure("timeout", world.rank, text, peer=node * world.ranks_per_node))
        world.check_running()

    @contextlib.contextmanager
    def _numbered(self) -> Iterator[None]:
        """Errors of the node's layer get the numbers of ranks and tokens of all nodes."""
        try:
            yield
        except CapacityError as error:
            raise self._too_many_rows(
                self._world.node.first_rank + error.rank, error.need
            ) from None
        except RoutingError as error:
            node, token = divmod(error.token, self._spec.max_tokens)
            raise RoutingError.build(
                "topk_ids and topk_weights",
                f"break a rule: ids must be in [-1, {self._spec.num_experts}) and distinct within "
                f"the token, weights finite",
                rank=node * self._world.ranks_per_node + error.rank,
                token=token,
                k=error.k,
            ) from None

    def _too_many_rows(self, rank: int, rows: int) -> CapacityError:
        whole = PlanShape(Geometry(self._spec, 0, self._world.size), self._shape.config)
        return too_many_rows(rank, rows, whole)
