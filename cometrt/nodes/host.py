"""Calls over several nodes on the host: MPI is the rail."""

from __future__ import annotations

from typing import Any

import numpy as np

from cometrt.errors import CapacityError, CometError, RoutingError
from cometrt.host import HostExecutor
from cometrt.nodes.executor import NodesExecutor
from cometrt.nodes.host_rail import HostRail
from cometrt.plan import PlanShape
from cometrt.plan.reference import too_many_rows
from cometrt.plan.routing import RoutingTables, check_routing
from cometrt.plan_ahead import PlanAhead
from cometrt.residuals import Residuals
from cometrt.specs import Geometry, Gradients, MoESpec
from cometrt.trace import Tracer
from cometrt.world.nodes import NodesWorld

Tables = tuple[np.ndarray, np.ndarray]


class HostNodesExecutor(NodesExecutor):
    """Runs a layer's calls: rail, the node's layer, rail."""

    inner: HostExecutor

    def __init__(
        self, world: NodesWorld, spec: MoESpec, shape: PlanShape, layer: int, mode: str
    ) -> None:
        """Collective. `shape`: of the layer within the node."""
        super().__init__(
            world, spec, shape, layer, lambda: HostExecutor(world.node, shape, layer, mode)
        )
        self.rail = HostRail(world, spec, layer)

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
        with self._guard("forward"):
            rail, all_x = self.rail, self.inner.buffer()
            local_ids, local_weights, tables = None, None, None
            if plan is None:
                tables = self._tables(ids, weights)
                num_tokens = rail.gather("forward", len(x), [(x, all_x), *tables])
                local_ids, local_weights = self._localize(tables)
            else:
                of_plan = int(plan.epoch[0])
                num_tokens = rail.gather("planned forward", len(x), [(x, all_x)], of_plan)
            partials, kept, failed = np.empty_like(all_x), None, None
            try:
                kept = self.inner.forward(
                    all_x,
                    local_ids,
                    local_weights,
                    w_up,
                    w_down,
                    training=training,
                    out=partials,
                    tracer=tracer,
                    plan=plan,
                )
            except (RoutingError, CapacityError) as error:
                failed = error
            self._return(num_tokens, [(partials, out)], failed, tables)
        return kept

    def plan(self, ids: np.ndarray, weights: np.ndarray, *, tracer: Tracer) -> dict[str, Any]:
        with self._guard("plan"):
            tables, made, failed = self._tables(ids, weights), {}, None
            num_tokens = self.rail.gather("plan", len(ids), list(tables))
            try:
                made = self.inner.plan(*self._localize(tables), tracer=tracer)
            except (RoutingError, CapacityError) as error:
                failed = error
            self._return(num_tokens, [], failed, tables)
        return made

    def backward(
        self, dy: np.ndarray, saved: Residuals, *, out: Gradients, accumulate: bool, tracer: Tracer
    ) -> None:
        """Fill `out`; weight gradients only once the exchange has succeeded on all nodes."""
        with self._guard("backward"):
            all_dy = np.empty((len(self.inner.buffer()), self._spec.hidden), dy.dtype)
            of_forward = int(saved.epoch[0])
            num_tokens = self.rail.gather("backward", len(dy), [(dy, all_dy)], of_forward)
            grads = Gradients(
                np.empty_like(all_dy),
                np.empty((len(all_dy), self._spec.topk), np.float32),
                np.empty(out.w_up.shape, np.float32),
                np.empty(out.w_down.shape, np.float32),
            )
            self.inner.backward(all_dy, saved, out=grads, accumulate=False, tracer=tracer)
            results = [(grads.x, out.x), (grads.topk_weights, out.topk_weights)]
            self._return(num_tokens, results)
        for result, value in ((out.w_up, grads.w_up), (out.w_down, grads.w_down)):
            result[:] = result + value if accumulate else value

    def _tables(self, ids: Any, weights: Any) -> tuple[Tables, Tables]:
        """(own, of the rail) ids and weights; an id beyond int32 stays out of range."""
        limits, pairs = np.iinfo(np.int32), (len(self.inner.buffer()), self._spec.topk)
        clipped = np.clip(ids, limits.min, limits.max).astype(np.int32)
        all_ids, all_weights = np.full(pairs, -1, np.int32), np.zeros(pairs, np.float32)
        return (clipped, all_ids), (weights, all_weights)

    def _localize(self, tables: tuple[Tables, Tables]) -> Tables:
        """The rail's tables for this node: ids of other nodes become -1. A token that breaks a rule
        gets an id that breaks it on every node."""
        (_, ids), (_, weights) = tables
        experts = self._shape.geometry.spec.num_experts
        first = self._world.node_index * experts
        here = (ids >= first) & (ids < first + experts)
        local = np.where(here, ids - first, -1).astype(np.int32)
        local[(ids < -1) | (ids >= self._spec.num_experts)] = experts
        for k in range(1, self._spec.topk):
            same = (ids[:, :k] == ids[:, k : k + 1]) & (ids[:, k : k + 1] >= 0)
            local[same.any(axis=1), k] = experts
        return local, weights

    def _return(
        self,
        num_tokens: list[int],
        results: list[Tables],
        failed: CometError | None = None,
        tables: Any = None,
    ) -> None:
        """Partial results go back. If the call failed on any node, all ranks raise."""
        if not self.rail.send_back(num_tokens, results, failed is not None):
            raise self._agreed_error(failed, tables)
        self.check_running()

    def _agreed_error(self, failed: CometError | None, tables: Any) -> CometError:
        """Collective, after a call that failed on some nodes: the error of all ranks. It is the one
        that a single node would raise."""
        world, spec = self._world, self._spec
        need = 0, 0
        wrong: RoutingError | None = None
        if isinstance(failed, CapacityError):
            need = failed.need, -(world.node.first_rank + failed.rank)
        (ids, _), (weights, _) = tables
        own = RoutingTables(ids[None], weights[None], np.array([len(ids)], np.int32))
        try:
            check_routing(own, spec, world.rank)
        except RoutingError as error:
            wrong = error
        ranks = world.allgather((wrong, need), purpose="errors of a call")
        errors: list[RoutingError] = [wrong for wrong, _ in ranks if wrong is not None]
        if errors:
            return errors[0]
        rows, rank = max(of for _, of in ranks)
        config = self._shape.config
        return too_many_rows(-rank, rows, PlanShape(Geometry(spec, 0, world.size), config))
