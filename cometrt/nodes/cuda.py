"""Calls over several nodes on CUDA: NCCL is the rail."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from cometrt.cuda.executor import CudaExecutor
from cometrt.cuda.graphs import CallGraphs
from cometrt.cuda.stats import DeviceStats
from cometrt.cuda.types import DeviceArray
from cometrt.errors import CallNotBegun, CapacityError, CometError, RoutingError
from cometrt.nodes.crossing import too_many_tokens
from cometrt.nodes.cuda_late import LateRail
from cometrt.nodes.cuda_rail import OUTCOMES, CudaRail
from cometrt.nodes.executor import NodesExecutor
from cometrt.nodes.nccl_sms import sms_for_nccl
from cometrt.nodes.slices import RailSlice, RailSlices
from cometrt.plan import PlanShape, TileConfig
from cometrt.plan.config import RAIL_FIELDS
from cometrt.plan.reference import too_many_rows
from cometrt.plan_ahead import PlanAhead
from cometrt.residuals import Residuals
from cometrt.specs import Gradients, MoESpec
from cometrt.stats import LayerStats, sum_stats
from cometrt.trace import Tracer
from cometrt.world.failure import Failure
from cometrt.world.nodes import NodesWorld
from cometrt.world.partitions import leave_sms

# Ids that rail_choose gives: as in kernels_cu/nodes/rail_ids.cuh.
_WRONG_PAIR, _TOO_MANY, _MOST_WANTED = -2, -(2**31), 2**30
_NEWS_SEC = 1.0  # the time in which another node's failure becomes known here


class CudaNodesExecutor(NodesExecutor):
    """Queues a layer's calls: rail, the slices in the node's layer, rail."""

    inner: CudaExecutor
    known = (CallNotBegun,)  # what all ranks raise comes later

    def __init__(
        self,
        world: NodesWorld,
        spec: MoESpec,
        shape: PlanShape,
        slices: RailSlices,
        layer: int,
        mode: str,
    ) -> None:
        """Collective. `shape`: of the layer within the node.

        Raises:
            ValueError: on all ranks, if there are several slices and NCCL may need more SMs than
                the config leaves to it.
        """
        import cupy as cp

        self._cp, self._generation = cp, world.generation
        self._nccl_sms = sms_for_nccl(world, shape.config)
        self._late = slices.late_parts > 0

        def make() -> CudaExecutor:
            with leave_sms(self._nccl_sms):
                return CudaExecutor(world.node, shape, layer, mode)

        super().__init__(world, spec, shape, slices, layer, make)
        self._name_in_reports()
        rail = LateRail if self._late else CudaRail
        self.rail = rail(world, spec, slices, layer, self.inner)
        of_call = shape.geometry.local_experts, shape.geometry.row_sets
        self._stats = [DeviceStats(*of_call) for _ in slices.calls()]
        self._last_stats: LayerStats | None = None
        cp.cuda.get_current_stream().synchronize()
        world.barrier()

    def buffer(self) -> Any:
        """This rank's tokens among those of its rail."""
        return self.rail.own_rows(self._all_x())

    def buffer_range(self) -> tuple[int, int]:
        """Addresses from the begin of `buffer` to the end of its memory."""
        begin, rows = self.buffer().data.ptr, self.rail.rows
        if self._slices.count == 1:
            return begin, self.inner.buffer_range()[1]
        return begin, rows.data.ptr + rows.nbytes

    def _all_x(self) -> Any:
        """Where x of the rail is gathered. With one slice it is where the node's layer wants it."""
        return self.inner.buffer() if self._slices.count == 1 else self.rail.rows

    def _all_dy(self) -> Any:
        """Where dy of the rail is gathered: late parts arrive where ranks pull them."""
        return self.inner.dy_buffer() if self._late else self.rail.rows

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
            rail, all_x = self.rail, self._all_x()
            operation = "forward" if plan is None else "planned forward"
            number = 0 if plan is None else plan.serial
            slots = plan.slots if plan else None
            own = rail.begin(operation, len(x), x, all_x, ids, weights, number, slots)
            plans = plan.of_slices() if plan else [None] * self._slices.count
            made = []
            for (index, of), planned in zip(self._calls(), plans, strict=True):
                rows = _rows_of(of, own, all_x)
                at = slice(of.begin, of.begin + len(rows))
                kept = self.inner.forward(
                    rows,
                    None if plan else rail.all_ids[at],
                    None if plan else rail.all_weights[at],
                    w_up,
                    w_down,
                    training=training,
                    out=rail.results[at],
                    tracer=tracer,
                    plan=planned,
                )
                made.append(kept or {})
                rail.end_slice(index, of, rows=True, dweights=False)
                self._save_late_rows(made[-1])
            rail.end(out, epochs=self._epochs(made) if training else ())
        return self._kept(made) if training else None

    def plan(self, ids: DeviceArray, weights: DeviceArray, *, tracer: Tracer) -> dict[str, Any]:
        with self._call("plan"):
            rail, made = self.rail, []
            rail.begin("plan", len(ids), ids=ids, weights=weights)
            for index, of in self._calls():
                at = slice(of.begin, of.end)
                made.append(self.inner.plan(rail.all_ids[at], rail.all_weights[at], tracer=tracer))
                rail.end_slice(index, of, rows=False, dweights=False)
            rail.end(epochs=self._epochs(made))
        return self._kept(made)

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
            rail, all_dy = self.rail, self._all_dy()
            of_forward = {"forward": saved.serial, "slots": saved.slots}
            own = rail.begin("backward", len(dy), dy, all_dy, **of_forward)
            for (index, of), part in zip(self._calls(), saved.of_slices(), strict=True):
                rows = _rows_of(of, own, all_dy)
                at = slice(of.begin, of.begin + len(rows))
                grads = Gradients(rail.results[at], rail.dweights[at], out.w_up, out.w_down)
                add = accumulate or index > 0
                self.inner.backward(rows, part, out=grads, accumulate=add, tracer=tracer)
                rail.end_slice(index, of, rows=True, dweights=True)
            rail.end(out.x, out.topk_weights)

    def _calls(self) -> Iterator[tuple[int, RailSlice]]:
        """The slices by number. What is queued next is behind the arrival of a slice's tokens."""
        for index, of in enumerate(self._slices.calls()):
            self.rail.begin_slice(of)
            self.inner.stats_address = self._stats[index].address
            yield index, of

    def _save_late_rows(self, kept: dict[str, Any]) -> None:
        """Where a forward keeps x itself, `publish` has copied it before late parts came."""
        if not self._late or kept.get("x") is None or self._spec.save == "rows":
            return
        late = self._slices.first_own_row
        rows, stream = self.inner.buffer()[:late], self._cp.cuda.get_current_stream()
        kept["x"].data.copy_from_device_async(rows.data, rows.nbytes, stream)

    def _kept(self, made: list[dict[str, Any]]) -> dict[str, Any]:
        """Fields of `Residuals` or `PlanAhead`, from those of the slices."""
        return made[0] | {"others": tuple(made[1:]), "slots": self.rail.slots}

    def _epochs(self, made: list[dict[str, Any]]) -> list[Any]:
        """Of a call's slices. With one slice its own kernels do all that is needed."""
        return [of["epoch"] for of in made] if self._slices.count > 1 else []

    def _name_in_reports(self) -> None:
        """Errors of calls from here on name tokens of these slices. The tuner makes executors of a
        layer with different ones."""
        self._world.layers[self._layer] = self._slices, self._shape, self._spec
        self.inner.name_in_reports()

    @contextlib.contextmanager
    def _call(self, operation: str) -> Iterator[None]:
        """Around a call: it follows the world's calls before it, on any streams."""
        self.inner.check_capture(operation)
        self._world.next_epoch()
        self._name_in_reports()
        gpu, stream = self._world.node.gpu, self._cp.cuda.get_current_stream()
        assert gpu is not None
        capturing = bool(stream.is_capturing())
        if not capturing and gpu.last_call is not None:
            stream.wait_event(gpu.last_call)
        try:
            with leave_sms(self._nccl_sms), self._guard(operation):
                yield
        except BaseException:
            if not capturing:
                self.rail.join()  # transfers that are queued
            raise
        finally:
            if capturing:
                gpu.captured = True
                self.captured.append(self.rail.read)
            else:
                self.inner.ended.record(stream)
                gpu.last_call = self.inner.ended

    @property
    def graphs(self) -> CallGraphs:
        return self.inner.graphs

    def reschedule(self, config: TileConfig) -> bool:
        """As `CudaExecutor.reschedule`."""
        own = self._shape.config
        if any(getattr(config, name) != getattr(own, name) for name in RAIL_FIELDS):
            return False
        with leave_sms(self._nccl_sms):
            return self.inner.reschedule(config.of_node())

    def retire(self) -> None:
        """As `CudaExecutor.retire`."""
        self.inner.rail = self.rail, self._stats
        self.inner.retire()

    def keep_for(self, layer: Any) -> Any:
        # They live as long as the queued calls of a dropped layer.
        self.inner.rail = self.rail, self._stats
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
            raise self.too_many_rows(rank, packed >> 16)
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
        """Errors of the node's layer get the numbers of ranks and tokens of all nodes. They may be
        those of another layer of the world."""
        world = self._world
        try:
            yield
        except CapacityError as error:
            (_, shape, spec), _ = self._failed_call()
            rank, factor = world.node.first_rank + error.rank, spec.capacity_factor
            raise too_many_rows(rank, error.need, shape, factor) from None
        except RoutingError as error:
            (slices, _, spec), slice_idx = self._failed_call()
            node, token = slices.slot_of(slices.calls()[slice_idx].begin + error.token)
            k = error.k
            if slices.wanted_only:
                if error.expert_id <= -_MOST_WANTED:
                    rank = node * world.ranks_per_node + error.rank
                    raise too_many_tokens(rank, error.expert_id - _TOO_MANY, spec) from None
                token, k = divmod(_WRONG_PAIR - error.expert_id, spec.topk)
            raise RoutingError.build(
                "topk_ids and topk_weights",
                f"break a rule: ids must be in [-1, {spec.num_experts}) and distinct within the "
                f"token, weights finite",
                rank=node * world.ranks_per_node + error.rank,
                token=token,
                k=k,
            ) from None

    def _failed_call(self) -> tuple[tuple[Any, Any, Any], int]:
        """(`NodesWorld.layers` of the layer, slice) of the call whose plan failed."""
        assert self._world.nccl is not None
        steps, deadline = self._world.nccl.steps, time.monotonic() + _NEWS_SEC
        while not int(steps[2]) and time.monotonic() < deadline:  # it comes right behind the error
            time.sleep(1e-4)
        layer, number = divmod(int(steps[2]), 256)
        steps[2] = 0
        if not number:
            layer, number = self._layer, 1
        return self._world.layers[layer], number - 1

    def stats(self) -> LayerStats | None:
        """Of the newest call whose slices have all succeeded."""
        found = [stats.read() for stats in self._stats]
        slices = [of for of in found if of is not None]
        numbers = [(of.epoch - index) % 2**32 for index, of in enumerate(slices)]
        if len(slices) == len(found) and len(set(numbers)) == 1:  # of one call
            self._last_stats = sum_stats(slices)
        return self._last_stats


def _rows_of(of: RailSlice, own: DeviceArray, all_rows: DeviceArray) -> DeviceArray:
    """The rows of a slice; own rows only of tokens that there are."""
    return all_rows[of.begin : of.end] if of.part is not None else own[of.begin : of.end]
