"""Forward and backward of one layer on CUDA: memory, order and replay of its calls.

What a call launches stands in `cometrt.cuda.queue`. In mode "fused" each call, and in others a
backward, that comes again with the same arguments and memory is one launch of a graph
(`cometrt.cuda.graphs`).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

from cometrt.cuda import buffers
from cometrt.cuda.exchange_params import Call
from cometrt.cuda.graphs import CallGraphs
from cometrt.cuda.heap import DeviceHeap
from cometrt.cuda.order import CallOrder
from cometrt.cuda.queue import CallQueue
from cometrt.cuda.trace import recorded_by
from cometrt.cuda.types import DeviceArray
from cometrt.errors import CallNotBegun
from cometrt.plan import PlanShape, TileConfig
from cometrt.plan_ahead import PlanAhead
from cometrt.residuals import Residuals
from cometrt.specs import Gradients
from cometrt.stats import LayerStats
from cometrt.trace import Recording, Tracer
from cometrt.world import World


class CudaExecutor:
    """Attributes:
    queue: the layer's launches.
    kernels: those of `queue`, by name.
    graphs: of calls that come again.
    forward_buffers: arrays that a forward allocates, by `training`; a planned one has its plan's
        tables.
    plan_buffers: arrays that a plan allocates.
    backward_buffers: arrays that a backward allocates.
    ended: event at the end of the last call.
    captured: memory of calls in CUDA graphs, which outlives them.
    rail: what a call over several nodes uses besides; None on one node.
    stats_address: where calls tell their CallStats; 0: `queue.stats`.
    """

    def __init__(self, world: World, shape: PlanShape, layer: int, mode: str) -> None:
        """Collective."""
        import cupy as cp

        self.rail: Any = None
        self.stats_address = 0
        self._cp, self._world, self._shape, self._layer = cp, world, shape, layer
        self._heap = DeviceHeap(world, shape)
        self._order = CallOrder(world, shape, layer)
        self.ended, self.captured = self._order.ended, self._order.captured
        report, meet = self._order.report.address, self._order.meet
        self.queue = CallQueue(world, shape, layer, mode, self._heap, report, meet)
        self.kernels, self.graphs = self.queue.kernels, CallGraphs()
        self._may_capture = shape.config.gemm == "engine"
        self._replayed: tuple[str, ...] = ("backward",) if self._may_capture else ()
        if mode == "fused":
            self._replayed += ("forward", "planned forward", "plan")
        self.forward_buffers = {
            training: buffers.forward_buffers(shape, mode, training) for training in (False, True)
        }
        self.plan_buffers = buffers.plan_buffers(shape)
        self.backward_buffers = buffers.backward_buffers(shape)
        self._offsets = {
            "forward": buffers.offsets(buffers.forward_scratch(shape)),
            "backward": buffers.offsets(buffers.backward_scratch(shape)),
        }
        cp.cuda.get_current_stream().synchronize()
        world.barrier()

    @property
    def generation(self) -> int:
        """That of a forward and its backward: one that a reset came between may have failed on some
        ranks."""
        return self._world.generation

    def buffer(self) -> Any:
        return self._heap.own("x")

    def buffer_range(self) -> tuple[int, int]:
        """Addresses [begin, end) of this rank's heap of rows, which begins with `buffer`."""
        return self._heap.place()

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
        """Returns the residuals that backward needs, but for the weights; see `Residuals.pack`."""
        self.check_capture("forward")
        with self._order.guard("forward"):
            given = {"x": self._heap.out_of_heap(x, "x")}
            wanted = self.forward_buffers[training]
            if plan is None:
                operation = "forward"
                given |= self._tables(ids, weights)
            else:
                operation = "planned forward"
                given |= {"plan_epoch": plan.epoch, "tables": plan.tables[0]}
                wanted = {name: of for name, of in wanted.items() if name != "tables"}
            new = self._new(wanted)
            arrays = given | {"w_up": w_up, "w_down": w_down, "out": out} | new
            at = self.with_scratch("forward", addresses(arrays))
            call = Call(operation, len(x), at, ids_are_64=_are_64(ids))
            self.enqueue(call, (given, new))
        if not training:
            return None
        z = None if self._shape.geometry.spec.save == "nothing" else new["z"]
        x = new.get("saved_x", new["x_rows"])
        return {"epoch": new["epoch"], "x": x, "z": z, "tables": (arrays["tables"],)}

    def plan(self, ids: DeviceArray, weights: DeviceArray, *, tracer: Tracer) -> dict[str, Any]:
        """Returns epoch and tables; see `PlanAhead.pack`."""
        self.check_capture("plan")
        with self._order.guard("plan"):
            given, new = self._tables(ids, weights), self._new(self.plan_buffers)
            call = Call("plan", len(ids), addresses(given | new), ids_are_64=_are_64(ids))
            self.enqueue(call, (given, new))
        return {"epoch": new["epoch"], "tables": (new["tables"],)}

    def _tables(self, ids: Any, weights: Any) -> dict[str, DeviceArray]:
        heap = self._heap
        return {
            "ids": heap.out_of_heap(ids, "ids0"),
            "weights": heap.out_of_heap(weights, "weights0"),
        }

    def reschedule(self, config: TileConfig) -> bool:
        """Use another config in place of the layer's own, where launches alone depend on what
        differs. Mode "fused". Graphs of earlier calls go.

        Returns:
            False, and nothing is changed, if the plan or larger memory depends on it too.
        """
        shape = PlanShape(self._shape.geometry, config)
        if not buffers.has_room_for(self._shape, shape):
            return False
        self.queue.reschedule(shape)
        self.graphs.clear()
        return True

    def with_scratch(self, operation: str, at: dict[str, int]) -> dict[str, int]:
        """The addresses of a call's arrays with those of the arrays within "scratch". A backward
        may compute z again: the down dgrad reads it before it writes dz there."""
        scratch = at.pop("scratch")
        at |= {name: scratch + offset for name, offset in self._offsets[operation].items()}
        if operation == "backward" and "z" not in at:
            at |= {"z": at["dz"], "a": at["weighted_a"]}
        return at

    def enqueue(self, call: Call, arrays: Any = ()) -> None:
        """Queue a call on CuPy's current stream, by launches or as a graph.

        Args:
            arrays: whose memory a graph of the caller needs as long as it may be replayed.
        """
        if self.stats_address:
            at = {**call.at, "stats": self.stats_address}
            call = dataclasses.replace(call, at=at)
        stream = self._cp.cuda.get_current_stream()
        capturing, graph = bool(stream.is_capturing()), None
        if not capturing and call.operation in self._replayed:
            # Before ranks meet: making a graph may wait for the device.
            key = (*call.key, *self.queue.depends_on())
            graph = self.graphs.find(key, lambda stream: self.queue.enqueue(stream, call))
        with self._order.launching(call.operation, capturing, arrays):
            if graph is None:
                self.queue.enqueue(stream.ptr, call)
            else:
                graph.launch(stream)

    def backward(
        self,
        dy: DeviceArray,
        saved: Residuals,
        *,
        out: Gradients,
        accumulate: bool,
        tracer: Tracer,
    ) -> None:
        """Fill `out`."""
        self.check_capture("backward")
        with self._order.guard("backward"):
            (tables,), save = saved.tables, self._shape.geometry.spec.save
            arrays = {
                "dy": self._heap.out_of_heap(dy, "dy"),
                "epoch": saved.epoch,
                "tables": tables,
                "w_up": saved.w_up,
                "w_down": saved.w_down,
                "out": out.x,
                "out_dweight": out.topk_weights,
                "dw_up": out.w_up,
                "dw_down": out.w_down,
                "x_rows" if save == "rows" else "saved_x": saved.x,
            } | self._new(self.backward_buffers)
            if saved.z is not None:
                arrays["z"] = saved.z
            wide = tuple(array.dtype.itemsize == 4 for array in (out.w_up, out.w_down))
            call = Call(
                "backward",
                len(dy),
                self.with_scratch("backward", addresses(arrays)),
                accumulate=accumulate,
                float32_gradients=(wide[0], wide[1]),
            )
            self.enqueue(call, tuple(arrays.values()))

    def check_capture(self, operation: str) -> None:
        """Refuse a call that cannot be captured in a CUDA graph, where the stream is capturing."""
        if not self._may_capture and self._cp.cuda.get_current_stream().is_capturing():
            raise CallNotBegun(
                ValueError(
                    f"{operation} must not be captured in a CUDA graph with gemm='cublas' "
                    "(the stream is capturing)"
                )
            )

    def _new(self, wanted: buffers.Buffers) -> dict[str, DeviceArray]:
        return {name: self._cp.ndarray(*of) for name, of in wanted.items()}

    def keep_until_done(self, arrays: list[Any]) -> None:
        """As `CallOrder.keep_until_done`."""
        if arrays:
            self._order.keep_until_done(arrays)

    def keep_for(self, layer: Any) -> Any:
        """As `CallOrder.keep_for`."""
        return self._order.keep_for(layer, self)

    def retire(self) -> None:
        """As `CallOrder.retire`."""
        self._order.retire(self)

    def guard(self, operation: str) -> contextlib.AbstractContextManager[None]:
        """As `CallOrder.guard`."""
        return self._order.guard(operation)

    @contextlib.contextmanager
    def recorded_by(self, recording: Recording) -> Iterator[None]:
        """Within it the fused kernels record themselves."""
        fused = self.queue.fused
        if not fused:
            yield
            return
        self.graphs.enabled, before = False, self.graphs.enabled  # they have other kernels
        try:
            with recorded_by(recording, fused, self.queue.state, self.ended):
                yield
        finally:
            self.graphs.enabled = before

    def stats(self) -> LayerStats | None:
        return self.queue.stats.read()

    def synchronize(self) -> None:
        """Wait for all calls of the world; raise what they have not raised yet."""
        self._order.synchronize()

    def close(self) -> None:
        try:
            self.synchronize()
        finally:
            self.give_up()

    def give_up(self) -> None:
        """As `close`, without waiting for calls, or raising what they have found."""
        self._heap.close()

    def raise_pending(self) -> None:
        """As `CallOrder.raise_pending`."""
        self._order.raise_pending()

    def check_running(self, prefix: str) -> None:
        """As `World.check_running`."""
        self._order.check_running(prefix)

    def stop_world(self, error: BaseException, operation: str) -> None:
        """As `CallOrder.stop_world`."""
        self._order.stop_world(error, operation)


def _are_64(ids: DeviceArray | None) -> bool:
    return ids is not None and ids.dtype.itemsize == 8


def addresses(arrays: dict[str, DeviceArray]) -> dict[str, int]:
    return {name: array.data.ptr for name, array in arrays.items()}
