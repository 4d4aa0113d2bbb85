"""Forward and backward of one layer on CUDA: memory, order and replay of its calls.

What a call launches stands in `cometrt.cuda.queue`. In mode "fused" each call, and in others a
backward, that comes again with the same arguments and memory is one launch of a graph
(`cometrt.cuda.graphs`).
"""

from __future__ import annotations

import contextlib
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
    forward_arrays: those but for "scratch", by `training` and whether the forward has a plan.
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
        self._mode = mode
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
        self.forward_arrays = {
            (training, planned): {
                name: of
                for name, of in self.forward_buffers[training].items()
                if name != "scratch" and not (planned and name == "tables")
            }
            for training in (False, True)
            for planned in (False, True)
        }
        self._scratch_bytes, self._save = (
            buffers.call_scratch_bytes(shape),
            shape.geometry.spec.save,
        )
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

    def dy_buffer(self) -> Any:
        return self._heap.own("dy")

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
            heap = self._heap
            x = heap.out_of_heap(x, "x")
            at = {
                "x": x.data.ptr,
                "w_up": w_up.data.ptr,
                "w_down": w_down.data.ptr,
                "out": out.data.ptr,
            }
            if plan is None:
                operation = "forward"
                ids, weights = self._tables(ids, weights)
                at["ids"], at["weights"] = ids.data.ptr, weights.data.ptr
            else:
                operation, tables = "planned forward", plan.tables[0]
                at["plan_epoch"], at["tables"] = plan.epoch.data.ptr, tables.data.ptr
            new = self._new(self.forward_arrays[training, plan is not None])
            for name, array in new.items():
                at[name] = array.data.ptr
            scratch = self._cp.cuda.alloc(self._scratch_bytes["forward"])
            at["scratch"] = scratch.ptr
            call = Call(operation, len(x), at, _are_64(ids))
            self.enqueue(call, (x, ids, weights, plan, new, scratch))
        if not training:
            return None
        z = None if self._save == "nothing" else new["z"]
        x = new["x_rows"] if self._save == "rows" else new["saved_x"]
        return {
            "epoch": new["epoch"],
            "x": x,
            "z": z,
            "tables": (new["tables"] if plan is None else tables,),
        }

    def plan(self, ids: DeviceArray, weights: DeviceArray, *, tracer: Tracer) -> dict[str, Any]:
        """Returns epoch and tables; see `PlanAhead.pack`."""
        self.check_capture("plan")
        with self._order.guard("plan"):
            (ids, weights), new = self._tables(ids, weights), self._new(self.plan_buffers)
            at = {name: array.data.ptr for name, array in new.items()}
            at["ids"], at["weights"] = ids.data.ptr, weights.data.ptr
            self.enqueue(Call("plan", len(ids), at, _are_64(ids)), (ids, weights, new))
        return {"epoch": new["epoch"], "tables": (new["tables"],)}

    def _tables(self, ids: Any, weights: Any) -> tuple[DeviceArray, DeviceArray]:
        heap = self._heap
        return heap.out_of_heap(ids, "ids0"), heap.out_of_heap(weights, "weights0")

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

    def enqueue(self, call: Call, arrays: Any = ()) -> None:
        """Queue a call on CuPy's current stream, by launches or as a graph. A replayed call
        needs the address of "scratch" alone.

        Args:
            arrays: whose memory a graph of the caller needs as long as it may be replayed.
        """
        if self.stats_address:
            call = call._replace(at={**call.at, "stats": self.stats_address})
        stream = self._cp.cuda.get_current_stream()
        if stream.is_capturing():
            self._order.launch_captured(lambda: self._launch(stream.ptr, call), arrays)
            return
        graph = None
        if call.operation in self._replayed:
            # Before ranks meet: making a graph may wait for the device.
            key = call.key, self.queue.depends_on()
            graph = self.graphs.find(key, lambda stream: self._launch(stream, call))
        if graph is None:
            self._order.launch(call.operation, stream, lambda: self._launch(stream.ptr, call))
        else:
            self._order.launch(call.operation, stream, lambda: graph.launch(stream))

    def _launch(self, stream: int, call: Call) -> None:
        """Queue a call's kernels. Its arrays within "scratch" get their addresses. A backward may
        compute z again: the down dgrad reads it before it writes dz there."""
        at = dict(call.at)
        if "scratch" in at:
            backward, scratch = call.operation == "backward", at.pop("scratch")
            offsets = self._offsets["backward" if backward else "forward"]
            at |= {name: scratch + offset for name, offset in offsets.items()}
            if backward and "z" not in at:
                at |= {"z": at["dz"], "a": at["weighted_a"]}
        self.queue.enqueue(stream, call._replace(at=at))

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
            (tables,), dy = saved.tables, self._heap.out_of_heap(dy, "dy")
            scratch = self._cp.cuda.alloc(self._scratch_bytes["backward"])
            at = {
                "dy": dy.data.ptr,
                "epoch": saved.epoch.data.ptr,
                "tables": tables.data.ptr,
                "w_up": saved.w_up.data.ptr,
                "w_down": saved.w_down.data.ptr,
                "out": out.x.data.ptr,
                "out_dweight": out.topk_weights.data.ptr,
                "dw_up": out.w_up.data.ptr,
                "dw_down": out.w_down.data.ptr,
                "x_rows" if self._save == "rows" else "saved_x": saved.x.data.ptr,
                "scratch": scratch.ptr,
            }
            if saved.z is not None:
                at["z"] = saved.z.data.ptr
            wide = out.w_up.dtype.itemsize == 4, out.w_down.dtype.itemsize == 4
            call = Call("backward", len(dy), at, accumulate=accumulate, float32_gradients=wide)
            self.enqueue(call, (dy, saved, out, scratch))

    def name_in_reports(self) -> None:
        """Errors of calls from here on are told by this executor's shape."""
        self._order.report.add_layer(self._layer, self._shape)

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
        """Within it calls are recorded, except those of mode "chunked", which use two streams."""
        if self._mode == "chunked":
            yield
            return
        queue, geometry = self.queue, self._shape.geometry
        self.graphs.enabled, before = False, self.graphs.enabled  # they have other launches
        try:
            with recorded_by(
                recording, queue.fused, queue.kernels, geometry, queue.state, self.ended
            ):
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
