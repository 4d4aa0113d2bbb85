"""Calls over several nodes on the host: MPI is the rail."""

from __future__ import annotations

from typing import Any

import numpy as np

from cometrt.errors import CapacityError, CometError, RoutingError
from cometrt.host import HostExecutor
from cometrt.nodes.crossing import slots_of, too_many_tokens
from cometrt.nodes.executor import NodesExecutor
from cometrt.nodes.host_rail import HostRail
from cometrt.nodes.slices import RailSlices
from cometrt.plan import PlanShape
from cometrt.plan.routing import RoutingTables, check_routing
from cometrt.plan_ahead import PlanAhead
from cometrt.residuals import Residuals
from cometrt.specs import Gradients, MoESpec
from cometrt.stats import LayerStats, sum_stats
from cometrt.trace import Tracer
from cometrt.world.nodes import NodesWorld

Tables = tuple[np.ndarray, np.ndarray]


class HostNodesExecutor(NodesExecutor):
    """Runs a layer's calls: rail, the slices in the node's layer, rail. Nothing overlaps.

    Rows are where one slice has them, also with several, or with late parts.
    """

    inner: HostExecutor

    def __init__(
        self,
        world: NodesWorld,
        spec: MoESpec,
        shape: PlanShape,
        slices: RailSlices,
        layer: int,
        mode: str,
    ) -> None:
        """Collective. `shape`: of the layer within the node."""
        super().__init__(
            world, spec, shape, slices, layer, lambda: HostExecutor(world.node, shape, layer, mode)
        )
        self.rail = HostRail(world, spec, layer)
        whole = RailSlices.of(spec, slices.nodes, slices.node)
        self._rows, self._first_row = whole.rows, whole.row_of
        self._places = _places(slices, whole)
        self._stats: LayerStats | None = None
        # x of all. With one slice it is where the node's layer wants it.
        self._all_x = self.inner.buffer()
        if slices.overlaps:
            self._all_x = np.zeros((self._rows, spec.hidden), spec.numpy_dtype)

    def buffer(self) -> np.ndarray:
        """This rank's tokens among those of its rail."""
        begin = self._first_row(self._world.node_index)
        return self._all_x[begin : begin + self._spec.max_tokens]

    def buffer_range(self) -> tuple[int, int]:
        """Addresses from the begin of `buffer` to the end of its memory."""
        begin = self.buffer().ctypes.data
        if not self._slices.overlaps:
            return begin, self.inner.buffer_range()[1]
        return begin, self._all_x.ctypes.data + self._all_x.nbytes

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
            rail, all_x, local, tables = self.rail, self._all_x, None, None
            if plan is None:
                tables = self._tables(ids, weights)
                slots, refused = self._slots(tables)
                arrays = [(x, all_x), *tables]
                num_tokens = rail.gather("forward", len(x), arrays, slots=slots, refused=refused)
                local = self._localize(tables, num_tokens)
            else:
                of_plan, slots = int(plan.epoch[0]), plan.slots
                num_tokens = rail.gather("planned forward", len(x), [(x, all_x)], of_plan, slots)
            plans = plan.of_slices() if plan else [None] * self._slices.count
            partials, calls = np.empty_like(all_x), _Calls()
            for place, planned in zip(self._places, plans, strict=True):
                result = partials[place]
                with calls:
                    kept = self.inner.forward(
                        all_x[place],
                        local[0][place] if local else None,
                        local[1][place] if local else None,
                        w_up,
                        w_down,
                        training=training,
                        out=result,
                        tracer=tracer,
                        plan=planned,
                    )
                    calls.add(kept, self.inner.stats())
                partials[place] = result
            self._return(num_tokens, [(partials, out)], slots, calls.failed, tables)
        self._stats = calls.stats()
        return calls.kept() | {"slots": slots} if training else None

    def plan(self, ids: np.ndarray, weights: np.ndarray, *, tracer: Tracer) -> dict[str, Any]:
        with self._guard("plan"):
            tables, calls = self._tables(ids, weights), _Calls()
            slots, refused = self._slots(tables)
            num_tokens = self.rail.gather(
                "plan", len(ids), list(tables), slots=slots, refused=refused
            )
            local_ids, local_weights = self._localize(tables, num_tokens)
            for place in self._places:
                with calls:
                    made = self.inner.plan(local_ids[place], local_weights[place], tracer=tracer)
                    calls.add(made, self.inner.stats())
            self._return(num_tokens, [], slots, calls.failed, tables)
        self._stats = calls.stats()
        return calls.kept() | {"slots": slots}

    def backward(
        self, dy: np.ndarray, saved: Residuals, *, out: Gradients, accumulate: bool, tracer: Tracer
    ) -> None:
        """Fill `out`; weight gradients only once the exchange has succeeded on all nodes."""
        with self._guard("backward"):
            all_dy = np.empty((self._rows, self._spec.hidden), dy.dtype)
            of_forward, calls = int(saved.epoch[0]), _Calls()
            arrays = [(dy, all_dy)]
            num_tokens = self.rail.gather("backward", len(dy), arrays, of_forward, saved.slots)
            grads = Gradients(
                np.empty_like(all_dy),
                np.empty((self._rows, self._spec.topk), np.float32),
                np.empty(out.w_up.shape, np.float32),
                np.empty(out.w_down.shape, np.float32),
            )
            for index, (place, of) in enumerate(zip(self._places, saved.of_slices(), strict=True)):
                dx, dweight = grads.x[place], grads.topk_weights[place]
                part = grads._replace(x=dx, topk_weights=dweight)
                # The weight gradients of all slices add up, in float32.
                self.inner.backward(
                    all_dy[place], of, out=part, accumulate=index > 0, tracer=tracer
                )
                grads.x[place], grads.topk_weights[place] = dx, dweight
                calls.add({}, self.inner.stats())
            results = [(grads.x, out.x), (grads.topk_weights, out.topk_weights)]
            self._return(num_tokens, results, saved.slots)
        for result, value in ((out.w_up, grads.w_up), (out.w_down, grads.w_down)):
            result[:] = result + value if accumulate else value
        self._stats = calls.stats()

    def stats(self) -> LayerStats | None:
        return self._stats

    def _tables(self, ids: Any, weights: Any) -> tuple[Tables, Tables]:
        """(own, of the rail) ids and weights; an id beyond int32 stays out of range."""
        limits, pairs = np.iinfo(np.int32), (self._rows, self._spec.topk)
        clipped = np.clip(ids, limits.min, limits.max).astype(np.int32)
        all_ids, all_weights = np.full(pairs, -1, np.int32), np.zeros(pairs, np.float32)
        return (clipped, all_ids), (weights, all_weights)

    def _slots(self, tables: tuple[Tables, Tables]) -> tuple[np.ndarray | None, int]:
        """(slots as in `Residuals`, how many tokens should cross if they are too many, else 0)."""
        if not self._slices.wanted_only:
            return None, 0
        spec, (own_ids, _), (own_weights, _) = self._spec, *tables
        nodes, node = self._slices.nodes, self._slices.node
        slots, most = slots_of(own_ids, own_weights, spec, nodes, node)
        return slots, most if most > spec.crossing_tokens else 0

    def _localize(self, tables: tuple[Tables, Tables], num_tokens: list[int]) -> Tables:
        """The rail's tables for this node: ids of other nodes become -1. A token that breaks a rule
        gets an id that breaks it on every node; so does the first row of a rank of which too many
        tokens should cross.

        Args:
            num_tokens: of `HostRail.gather`.
        """
        (_, ids), (_, weights) = tables
        experts = self._spec.num_experts // self._world.nodes
        first = self._world.node_index * experts
        here = (ids >= first) & (ids < first + experts)
        local = np.where(here, self._plan_experts(ids - first), -1).astype(np.int32)
        wrong = self._shape.geometry.spec.num_experts
        local[(ids < -1) | (ids >= self._spec.num_experts)] = wrong
        for k in range(1, self._spec.topk):
            same = (ids[:, :k] == ids[:, k : k + 1]) & (ids[:, k : k + 1] >= 0)
            local[same.any(axis=1), k] = wrong
        for node, count in enumerate(num_tokens):
            if count < 0:
                local[self._first_row(node), 0] = wrong
        return local, weights

    def _plan_experts(self, ids: np.ndarray) -> np.ndarray:
        """Plan experts of the rail's ids [R, K], those of this node's experts: see
        `Geometry.row_sets`."""
        slices, geometry = self._slices, self._shape.geometry
        if not slices.late_parts:
            return ids
        sets = np.zeros((self._rows, 1), np.int64)
        for node in range(slices.nodes):
            if node != slices.node:
                of_node = slice(self._first_row(node), self._first_row(node) + slices.crossing)
                sets[of_node, 0] = 1 + np.arange(slices.crossing) // slices.part_tokens
        rank, expert = np.divmod(ids, geometry.num_weights)
        return (rank * geometry.row_sets + sets) * geometry.num_weights + expert

    def _return(
        self,
        num_tokens: list[int],
        results: list[Tables],
        slots: np.ndarray | None,
        failed: CometError | None = None,
        tables: Any = None,
    ) -> None:
        """Partial results go back. If the call failed on any node, all ranks raise."""
        if not self.rail.send_back(num_tokens, results, failed is not None, slots):
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
        found = wrong, need, self._slots(tables)[1]
        ranks = world.allgather(found, purpose="errors of a call")
        errors: list[RoutingError] = [wrong for wrong, *_ in ranks if wrong is not None]
        if errors:
            return errors[0]
        for rank, (*_, refused) in enumerate(ranks):
            if refused:
                return too_many_tokens(rank, refused, spec)
        rows, rank = max(of for _, of, _ in ranks)
        return self.too_many_rows(-rank, rows)


def _places(slices: RailSlices, whole: RailSlices) -> list[Any]:
    """Where the rows of each slice are, among those of one slice, `whole`."""
    own = whole.row_of(slices.node)
    if slices.count == 1:
        return [slice(0, whole.rows)]
    others = [whole.row_of(node) for node in range(slices.nodes) if node != slices.node]
    return [
        slice(own + call.begin, own + call.end)
        if call.part is None
        else np.concatenate([first + np.array(slices.slots_of(call.part), int) for first in others])
        for call in slices.calls()
    ]


class _Calls:
    """The calls of the node's layer within a call. Those behind one that failed are made all the
    same, so that all nodes count the same exchanges.

    Attributes:
        failed: the error of all: a wrong table, else the largest need of rows.
    """

    def __init__(self) -> None:
        self.failed: CometError | None = None
        self._kept: list[dict[str, Any]] = []
        self._stats: list[LayerStats] = []

    def __enter__(self) -> None:
        """Around one of them."""

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> bool:
        if not isinstance(error, (RoutingError, CapacityError)):
            return False
        need = [of.need if isinstance(of, CapacityError) else 0 for of in (self.failed, error)]
        if self.failed is None or isinstance(error, RoutingError) or need[0] < need[1]:
            self.failed = error
        return True

    def add(self, kept: dict[str, Any] | None, stats: LayerStats | None) -> None:
        assert stats is not None
        self._kept.append(kept or {})
        self._stats.append(stats)

    def kept(self) -> dict[str, Any]:
        """Fields of `Residuals` or `PlanAhead`."""
        first, *others = self._kept
        return first | {"others": tuple(others)}

    def stats(self) -> LayerStats:
        return sum_stats(self._stats)
