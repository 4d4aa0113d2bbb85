"""Forward and backward of one layer on CUDA; the protocol of kernels_cu/README.md across ranks.

A call is a handful of launches, queued without waiting for the device:

    forward, fused       publish, prepare, layer0, layer1, finish
    forward, sequential  publish, prepare, dispatch, up, down, push, home_reduce, finish
    forward, chunked     likewise in parts, on two streams (cometrt/cuda/chunked.py)
    backward             publish, agree, dispatch, GEMMs, push, GEMMs, home_reduce, finish

A fused forward that comes again with the same arguments and memory is one launch of a graph of
these five (cometrt/cuda/graphs.py).

cuBLAS, which backward always uses, has to know the experts' rows on the host: such a call waits
once for its plan.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from cometrt.buffers import plan_rows
from cometrt.cuda import buffers
from cometrt.cuda.chunked import ChunkedForward
from cometrt.cuda.exchange_params import ExchangeParamsBuilder, set_fields, set_tables
from cometrt.cuda.experts import CublasExperts, EngineExperts, RowsOnHost
from cometrt.cuda.fused import FusedForward
from cometrt.cuda.graphs import CallGraphs
from cometrt.cuda.heap import DeviceHeap
from cometrt.cuda.order import CallOrder
from cometrt.cuda.planner import DevicePlanner
from cometrt.cuda.row_kernels import RowKernels
from cometrt.cuda.trace import recorded_by
from cometrt.kernels.launch import load_kernels
from cometrt.kernels.params import (
    ParamStruct,
    exchange_state_dtype,
    link_params,
    tile_order_params_dtype,
    traced_exchange_state_dtype,
)
from cometrt.plan import PlanShape
from cometrt.residuals import Residuals
from cometrt.specs import Gradients
from cometrt.trace import Recording, Tracer
from cometrt.world import World
from cometrt.world.partitions import num_sms

_THREADS, _PUBLISH_THREADS = 256, 512


class CudaExecutor:
    num_tables = 1  # of a plan, in `saved`

    def __init__(self, world: World, shape: PlanShape, layer: int, mode: str) -> None:
        """Collective."""
        import cupy as cp

        self._cp, self._world, self._shape, self._layer = cp, world, shape, layer
        self._heap = DeviceHeap(world, shape)
        # What kernels of a forward count up; publish sets it to zero.
        sizes = buffers.num_counters(shape, mode)
        self._counters = cp.zeros(sum(sizes), cp.uint32)
        self._planner = DevicePlanner(shape, self._counters[: sizes[0]])
        self._state = cp.zeros(traced_exchange_state_dtype.itemsize, cp.uint8)
        self._publish, self._agree, self._finish = load_kernels(
            "protocol/publish.cu", "publish", "agree", "finish"
        )
        self._links = cp.zeros(2, cp.uint64)  # clocks of what comes and of what leaves
        clocks = self._links.data.ptr
        self._dispatch_link, self._combine_link = (
            link_params(clock, world.link) for clock in (clocks, clocks + 8)
        )
        parts, positions = buffers.num_pipeline_chunks(shape, mode), self._planner.block_order_idx
        rows = RowKernels(shape, self._dispatch_link, self._combine_link, positions, parts)
        self._pull, self._push, self._home_reduce = rows.pull, rows.push, rows.home_reduce
        self._cublas = CublasExperts(shape)
        self._engine = self._fused = self._chunked = None
        if mode == "fused":
            counters, ok = self._counters[sizes[0] :], self._ok_address()
            self._fused = FusedForward(shape, self._dispatch_link, self._combine_link, counters, ok)
        elif shape.config.gemm == "engine":
            self._engine = EngineExperts(shape, parts, self._ok_address())
        if mode == "chunked":
            assert self._engine is not None
            self._chunked = ChunkedForward(shape, self._engine, rows)
        self._order = CallOrder(world, shape, layer)
        self.ended, self.captured = self._order.ended, self._order.captured
        self._rows_on_host = RowsOnHost(shape.geometry.local_experts, self._state)
        self._calls = ExchangeParamsBuilder(world, shape, self._heap, layer)
        self._num_sms, self._rows = num_sms(), plan_rows(shape)
        self._forward_buffers = {
            training: buffers.forward_buffers(shape, mode, training) for training in (False, True)
        }
        self._backward_buffers = buffers.backward_buffers(shape)
        self._o_at = buffers.o_offset(shape)
        self.graphs = CallGraphs()
        cp.cuda.get_current_stream().synchronize()
        world.barrier()

    @property
    def generation(self) -> int:
        """That of a forward and its backward: one that a reset came between may have failed on some
        ranks."""
        return self._world.generation

    # ---- the calls --------------------------------------------------------------------------

    def buffer(self) -> Any:
        return self._heap.own("x")

    def buffer_place(self) -> tuple[int, int]:
        """Addresses [begin, end) of this rank's heap of rows, which begins with `buffer`."""
        return self._heap.place()

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
    ) -> tuple[Any, ...] | None:
        capturing = bool(self._cp.cuda.get_current_stream().is_capturing())
        with self._order.guard("forward"):
            return self._forward((x, ids, weights, w_up, w_down, out), training, capturing)

    def _forward(
        self, given: tuple[Any, ...], training: bool, capturing: bool
    ) -> tuple[Any, ...] | None:
        x, ids, weights, w_up, w_down, out = given
        cp = self._cp
        x, ids, weights = (
            self._heap.out_of_heap(array, name)
            for array, name in ((x, "x"), (ids, "ids0"), (weights, "weights0"))
        )
        new = {name: cp.ndarray(*of) for name, of in self._forward_buffers[training].items()}
        names = ("epoch", "saved_x", "tables", "x_rows", "z")
        epoch, saved_x, tables, x_rows, z = (new.get(name) for name in names)
        scratch = new["a_and_o"].data
        given, made = (x, ids, weights, w_up, w_down, out), (epoch, saved_x, tables, x_rows, z)

        def launch() -> None:
            self._launch_forward(given, made, scratch)

        graph = None
        if self._fused is not None and not capturing:
            arrays = [0 if array is None else array.data.ptr for array in (*given, *made)]
            state = self._calls.world_pointers()
            key = (len(x), ids.dtype.itemsize, scratch.ptr, *arrays, *state)
            graph = self.graphs.find(key, launch)
        with self._order.launching("forward", capturing, (x, ids, weights, *made, scratch)):
            if graph is None:
                launch()
            else:
                graph.launch(cp.cuda.get_current_stream())
        if not training:
            return None
        return Residuals.pack(
            shape=self._shape,
            layer=self._layer,
            num_tokens=len(x),
            epoch=epoch,
            world=self._world.identity,
            generation=self.generation,
            x=x_rows if saved_x is None else saved_x,
            z=z,
            tables=(tables,),
            w_up=w_up,
            w_down=w_down,
        )

    def _launch_forward(self, given: tuple[Any, ...], made: tuple[Any, ...], scratch: Any) -> None:
        """All kernels of a forward, from its arguments and the memory made for it."""
        x, ids, weights, w_up, w_down, out = given
        epoch, saved_x, tables, x_rows, z = made
        a = self._cp.ndarray(*self._rows["a"], scratch)
        o = self._cp.ndarray(*self._rows["o"], scratch + self._o_at)
        call = self._calls.begin(
            "forward", len(x), self._state.data.ptr, self._order.report.address
        )
        call.fields["weighted"] = 1
        call.fields["ids_are_64"] = ids.dtype.itemsize == 8
        set_fields(
            call,
            x=x.data.ptr,
            ids=ids.data.ptr,
            weights=weights.data.ptr,
            out=out.data.ptr,
            all_ids=self._planner.ids.data.ptr,
            all_weights=self._planner.weights.data.ptr,
            progress=self._planner.progress.data.ptr,
            counters=self._counters.data.ptr,
            saved_epoch=0 if epoch is None else epoch.data.ptr,
            saved_x=0 if saved_x is None else saved_x.data.ptr,
            pull_offset=self._heap.table["x"].offset,
            rows=x_rows.data.ptr,
            partial_rows=o.data.ptr,
        )
        call.fields["num_counters"] = self._counters.size
        set_tables(call, self._planner.exchange_tables(tables))
        if self._fused is not None:
            self._fused_forward(call, self._fused, w_up, w_down, (tables, x_rows, z, a, o))
        else:
            self._sequential_forward(call, w_up, w_down, (tables, x_rows, z, a, o))
        self._end(call)

    def _fused_forward(
        self,
        call: ParamStruct,
        fused: FusedForward,
        w_up: Any,
        w_down: Any,
        buffers: tuple[Any, ...],
    ) -> None:
        tables, x_rows, z, a, o = buffers
        set_fields(call, **{name: part.data.ptr for name, part in fused.counters.items()})
        self._publish((self._num_sms,), _PUBLISH_THREADS, call)
        self._planner.prepare(call, tables, fused.up_order, fused.down_order, self._dispatch_link)
        fused.layer0(call, x_rows, w_up, z, a)
        fused.layer1(call, a, w_down, o)

    def _sequential_forward(
        self, call: ParamStruct, w_up: Any, w_down: Any, buffers: tuple[Any, ...]
    ) -> None:
        tables, x_rows, z, a, o = buffers
        engine = self._engine
        up, down = (engine.up_order, engine.down_order) if engine else (_NO_ORDER, _NO_ORDER)
        self._publish((self._num_sms,), _PUBLISH_THREADS, call)
        self._planner.prepare(call, tables, up, down, self._dispatch_link)
        if self._chunked is not None:
            self._chunked(call, x_rows, w_up, w_down, z, a, o)
            return
        if engine is not None:
            self._pull(call)
            engine.forward(x_rows, w_up, w_down, z, a, o)
            self._combine(call, lambda: None)
            return
        plan = self._planner.plan_of(tables)
        rows = self._rows_on_host(plan)
        if rows:
            self._pull(call)
            self._cublas.forward(plan, rows, x_rows, w_up, w_down, z, a, o)
            self._combine(call, self._order.meet)

    def backward(
        self, dy: Any, saved: Residuals, *, out: Gradients, accumulate: bool, tracer: Tracer
    ) -> bool:
        """Fill `out`. False if it did nothing, behind a call that failed."""
        if self._cp.cuda.get_current_stream().is_capturing():
            raise ValueError(
                "backward must not be captured in a CUDA graph (the stream is capturing)"
            )
        with self._order.guard("backward"):
            return self._backward(dy, saved, out, accumulate)

    def _backward(self, dy: Any, saved: Residuals, out: Gradients, accumulate: bool) -> bool:
        cp, planner = self._cp, self._planner
        dy = self._heap.out_of_heap(dy, "dy")
        (tables,) = saved.tables
        plan = planner.plan_of(tables)
        pulls_again = self._shape.geometry.spec.save == "z"
        new = {name: cp.empty(*of) for name, of in self._backward_buffers.items()}
        dy_rows, dx_rows, dz, weighted_a, da, dweight_rows = (
            new[name] for name in "dy_rows dx_rows dz weighted_a da dweight_rows".split()
        )
        x_rows = new["x_rows"] if pulls_again else saved.x
        call = self._calls.begin(
            "backward", len(dy), self._state.data.ptr, self._order.report.address
        )
        call.fields["weighted"] = 0
        set_fields(
            call,
            x=saved.x.data.ptr if pulls_again else 0,
            dy=dy.data.ptr,
            forward_epoch=saved.epoch.data.ptr,
            out=out.x.data.ptr,
            out_dweight=out.topk_weights.data.ptr,
            pull_offset=self._heap.table["dy"].offset,
            rows=dy_rows.data.ptr,
            partial_rows=dx_rows.data.ptr,
            dweight_rows=dweight_rows.data.ptr,
        )
        set_tables(call, planner.exchange_tables(tables))
        with self._order.launching("backward", capturing=False):
            self._publish((self._num_sms,), _PUBLISH_THREADS, call)
            self._agree((1,), _THREADS, call)
            rows = self._rows_on_host(plan)
            if not rows:
                if not accumulate:
                    for gradient in (out.w_up, out.w_down):
                        gradient.data.memset_async(0xFF, gradient.nbytes)  # NaN
                self._end(call)
                return False
            self._pull(call)
            if pulls_again:  # before the first partial of dx leaves
                set_fields(call, pull_offset=self._heap.table["x"].offset, rows=x_rows.data.ptr)
                self._pull(call)
            self._cublas.grad_rows(
                saved, rows, dy_rows, da, dz, weighted_a, dweight_rows, dx_rows, plan
            )

            def weights() -> None:
                self._cublas.grad_weights(rows, dz, x_rows, dy_rows, weighted_a, out, accumulate)
                self._order.meet()

            self._combine(call, weights)
            self._end(call)
        return True

    def keep_for(self, layer: Any) -> Any:
        """As `CallOrder.keep_for`."""
        return self._order.keep_for(layer, self)

    def retire(self) -> None:
        """As `CallOrder.retire`."""
        self._order.retire(self)

    def recorded_by(self, recording: Recording) -> contextlib.AbstractContextManager[None]:
        """Within it the fused forward's kernels record themselves."""
        if self._fused is None:
            return contextlib.nullcontext()
        return self._recorded_by(recording, self._fused)

    @contextlib.contextmanager
    def _recorded_by(self, recording: Recording, fused: FusedForward) -> Iterator[None]:
        self.graphs.enabled, before = False, self.graphs.enabled  # they have other kernels
        try:
            with recorded_by(recording, fused, self._state, self.ended):
                yield
        finally:
            self.graphs.enabled = before

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

    def _end(self, call: ParamStruct) -> None:
        self._finish((self._num_sms,), _THREADS, call)

    def _combine(self, call: ParamStruct, between: Callable[[], None]) -> None:
        """Push, then `between`, which covers the exchange, then add up at home."""
        self._push(call)
        between()
        self._home_reduce(call)

    def _ok_address(self) -> int:
        """Of CallState.ok, by which a GEMM knows that there is something to do."""
        return int(self._state.data.ptr) + exchange_state_dtype.fields["ok"][1]  # type: ignore[index]


_NO_ORDER = ParamStruct(tile_order_params_dtype)
