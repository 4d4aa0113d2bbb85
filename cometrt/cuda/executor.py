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
import itertools
import math
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from cometrt.cuda.calls import Calls, set_tables, set_words
from cometrt.cuda.chunked import ChunkedForward
from cometrt.cuda.experts import CublasExperts, EngineExperts
from cometrt.cuda.fused import FusedForward, fused_counters
from cometrt.cuda.graphs import CallGraphs
from cometrt.cuda.planner import DevicePlanner, planner_counters
from cometrt.cuda.report import pinned, report_of, tell_unspecified
from cometrt.cuda.rows import RowMovers
from cometrt.cuda.trace import recorded_by
from cometrt.errors import CallNotBegun, CometError
from cometrt.heap import SymmetricHeap
from cometrt.kernels.launch import load_kernels
from cometrt.kernels.params import (
    Record,
    call_state_dtype,
    pace_record,
    traced_call_state_dtype,
    turns_params,
)
from cometrt.plan import PlanShape
from cometrt.saved import Saved
from cometrt.specs import Gradients
from cometrt.trace import Recording, Tracer
from cometrt.world import World
from cometrt.world.partitions import num_sms

_THREADS, _PUBLISH_THREADS = 256, 512
_ALIGNMENT = 512  # bytes


class CudaExecutor:
    num_tables = 1  # of a plan, in `saved`

    def __init__(self, world: World, shape: PlanShape, layer: int, mode: str) -> None:
        """Collective."""
        import cupy as cp

        self._cp, self._world, self._shape, self._layer = cp, world, shape, layer
        geometry, spec = shape.geometry, shape.geometry.spec
        if spec.dtype != "bfloat16":
            raise ValueError(f"dtype must be 'bfloat16' on device='cuda' (got {spec.dtype!r})")
        self._heap = SymmetricHeap(world, shape)
        # What kernels of a forward count up; publish sets it to zero.
        sizes = planner_counters(shape), fused_counters(shape) if mode == "fused" else 0
        self._counters = cp.zeros(sum(sizes), cp.uint32)
        self._planner = DevicePlanner(shape, self._counters[: sizes[0]])
        self._state = cp.zeros(traced_call_state_dtype.itemsize, cp.uint8)
        self._publish, self._agree, self._finish = load_kernels(
            "protocol/publish.cu", "publish", "agree", "finish"
        )
        self._links = cp.zeros(2, cp.uint64)  # clocks of what comes and of what leaves
        clocks = self._links.data.ptr
        self._pull_pace, self._push_pace = (
            pace_record(clock, world.link) for clock in (clocks, clocks + 8)
        )
        parts, positions = 1, self._planner.block_order_idx
        if mode == "chunked":
            parts = shape.config.parts
        rows = RowMovers(shape, self._pull_pace, self._push_pace, positions, parts)
        self._pull, self._push, self._add_up = rows.pull, rows.push, rows.add_up
        self._cublas = CublasExperts(shape)
        self._engine = self._fused = self._chunked = None
        if mode == "fused":
            counters, ok = self._counters[sizes[0] :], self._ok_address()
            self._fused = FusedForward(shape, self._pull_pace, self._push_pace, counters, ok)
        elif shape.config.gemm == "engine":
            self._engine = EngineExperts(shape, parts, self._ok_address())
        if mode == "chunked":
            assert self._engine is not None
            self._chunked = ChunkedForward(shape, self._engine, rows)
        self._report = report_of(world)
        self._report.add_layer(layer, shape)
        self._verdict = pinned(call_state_dtype)
        self._offsets = pinned(np.dtype(np.int32), geometry.local_experts + 1)
        self.ended = cp.cuda.Event(disable_timing=True)  # at the end of the layer's last call
        self._last_operation = ""
        self._calls = Calls(world, shape, self._heap, layer)
        self._num_sms, self._row_shape = num_sms(), (shape.capacity, spec.hidden)
        self._up_shape = (shape.capacity, geometry.up_columns)
        self._inner_shape = (shape.capacity, geometry.local_intermediate)
        self._o_at = -(-2 * math.prod(self._inner_shape) // _ALIGNMENT) * _ALIGNMENT
        self._dtype = spec.numpy_dtype
        self.graphs = CallGraphs()
        self.captured: list[Any] = []  # memory of calls in graphs, which outlives them
        cp.cuda.get_current_stream().synchronize()
        world.barrier()

    @property
    def generation(self) -> int:
        """That of a forward and its backward: one that a reset came between may have failed on some
        ranks."""
        return self._world.generation

    # ---- the calls --------------------------------------------------------------------------

    def buffer(self) -> Any:
        spec = self._shape.geometry.spec
        return self._own("x", (spec.max_tokens, spec.hidden), spec.numpy_dtype)

    def buffer_place(self) -> tuple[int, int]:
        """Addresses [begin, end) of this rank's heap of rows, which begins with `buffer`."""
        return self._heap.rows_place(self._world.segment("data", self._world.rank))

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
        with self._guard("forward"):
            return self._forward((x, ids, weights, w_up, w_down, out), training, capturing)

    def _forward(
        self, given: tuple[Any, ...], training: bool, capturing: bool
    ) -> tuple[Any, ...] | None:
        x, ids, weights, w_up, w_down, out = given
        cp, spec, dtype = self._cp, self._shape.geometry.spec, self._dtype
        x, ids, weights = (
            self._out_of_heap(array, name)
            for array, name in ((x, "x"), (ids, "ids0"), (weights, "weights0"))
        )
        new, saved_x = cp.ndarray, None
        if training and spec.save == "z":
            saved_x = new((spec.max_tokens, spec.hidden), dtype)
        epoch = new(1, np.int64) if training else None
        tables = self._planner.new_tables()
        x_rows = new(self._row_shape, dtype)
        z = None
        if training or (self._fused is None and self._engine is None):
            z = new(self._up_shape, dtype)
        scratch = cp.cuda.alloc(self._o_at + 2 * math.prod(self._row_shape))  # a, then o
        given, made = (x, ids, weights, w_up, w_down, out), (epoch, saved_x, tables, x_rows, z)

        def launch() -> None:
            self._launch_forward(given, made, scratch)

        graph = None
        if self._fused is not None and not capturing:
            arrays = [0 if array is None else array.data.ptr for array in (*given, *made)]
            state = self._calls.state_of_world()
            key = (len(x), ids.dtype.itemsize, scratch.ptr, *arrays, *state)
            graph = self.graphs.find(key, launch)
        with self._launching("forward", capturing, (x, ids, weights, *made, scratch)):
            if graph is None:
                launch()
            else:
                graph.launch(cp.cuda.get_current_stream())
        if not training:
            return None
        return Saved.pack(
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
        a = self._cp.ndarray(self._inner_shape, self._dtype, scratch)
        o = self._cp.ndarray(self._row_shape, self._dtype, scratch + self._o_at)
        call = self._calls.begin("forward", len(x), self._state.data.ptr, self._report.address)
        call.fields["weighted"] = 1
        call.fields["ids_are_64"] = ids.dtype.itemsize == 8
        set_words(
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
        set_tables(call, self._planner.call_tables(tables))
        if self._fused is not None:
            self._fused_forward(call, self._fused, w_up, w_down, (tables, x_rows, z, a, o))
        else:
            self._sequential_forward(call, w_up, w_down, (tables, x_rows, z, a, o))
        self._end(call)

    def _fused_forward(
        self, call: Record, fused: FusedForward, w_up: Any, w_down: Any, buffers: tuple[Any, ...]
    ) -> None:
        tables, x_rows, z, a, o = buffers
        set_words(call, **{name: part.data.ptr for name, part in fused.counters.items()})
        self._publish((self._num_sms,), _PUBLISH_THREADS, call)
        self._planner.prepare(call, tables, fused.up_turns, fused.down_turns, self._pull_pace)
        fused.layer0(call, x_rows, w_up, z, a)
        fused.layer1(call, a, w_down, o)

    def _sequential_forward(
        self, call: Record, w_up: Any, w_down: Any, buffers: tuple[Any, ...]
    ) -> None:
        tables, x_rows, z, a, o = buffers
        engine = self._engine
        up, down = (engine.up_turns, engine.down_turns) if engine else (_NO_TURNS, _NO_TURNS)
        self._publish((self._num_sms,), _PUBLISH_THREADS, call)
        self._planner.prepare(call, tables, up, down, self._pull_pace)
        if self._chunked is not None:
            self._chunked(call, x_rows, w_up, w_down, z, a, o)
            return
        if engine is not None:
            self._pull(call)
            engine.forward(x_rows, w_up, w_down, z, a, o)
            self._combine(call, lambda: None)
            return
        plan = self._planner.plan_of(tables)
        rows = self._group_rows(plan)
        if rows:
            self._pull(call)
            self._cublas.forward(plan, rows, x_rows, w_up, w_down, z, a, o)
            self._combine(call, self._meet)

    def backward(
        self, dy: Any, saved: Saved, *, out: Gradients, accumulate: bool, tracer: Tracer
    ) -> bool:
        """Fill `out`. False if it did nothing, behind a call that failed."""
        if self._cp.cuda.get_current_stream().is_capturing():
            raise ValueError(
                "backward must not be captured in a CUDA graph (the stream is capturing)"
            )
        with self._guard("backward"):
            return self._backward(dy, saved, out, accumulate)

    def _backward(self, dy: Any, saved: Saved, out: Gradients, accumulate: bool) -> bool:
        cp, planner = self._cp, self._planner
        dy = self._out_of_heap(dy, "dy")
        (tables,) = saved.tables
        plan = planner.plan_of(tables)
        pulls_again = self._shape.geometry.spec.save == "z"
        dy_rows, dx_rows = (cp.empty(self._row_shape, self._dtype) for _ in range(2))
        x_rows = cp.empty(self._row_shape, self._dtype) if pulls_again else saved.x
        dz, weighted_a = (
            cp.empty(shape, self._dtype) for shape in (self._up_shape, self._inner_shape)
        )
        da = cp.empty(self._inner_shape, cp.float32)
        dweight_rows = cp.empty(self._shape.capacity, cp.float32)
        call = self._calls.begin("backward", len(dy), self._state.data.ptr, self._report.address)
        call.fields["weighted"] = 0
        set_words(
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
        set_tables(call, planner.call_tables(tables))
        with self._launching("backward", capturing=False):
            self._publish((self._num_sms,), _PUBLISH_THREADS, call)
            self._agree((1,), _THREADS, call)
            rows = self._group_rows(plan)
            if not rows:
                if not accumulate:
                    for gradient in (out.w_up, out.w_down):
                        gradient.data.memset_async(0xFF, gradient.nbytes)  # NaN
                self._end(call)
                return False
            self._pull(call)
            if pulls_again:  # before the first partial of dx leaves
                set_words(call, pull_offset=self._heap.table["x"].offset, rows=x_rows.data.ptr)
                self._pull(call)
            self._cublas.grad_rows(
                saved, rows, dy_rows, da, dz, weighted_a, dweight_rows, dx_rows, plan
            )

            def weights() -> None:
                self._cublas.grad_weights(rows, dz, x_rows, dy_rows, weighted_a, out, accumulate)
                self._meet()

            self._combine(call, weights)
            self._end(call)
        return True

    def keep_for(self, layer: Any) -> weakref.finalize:
        """When the layer is dropped, keep what its queued calls use until they have ended, and what
        its graphs use as long as the world."""
        finalizer = weakref.finalize(layer, self.retire)
        finalizer.atexit = False
        return finalizer

    def retire(self) -> None:
        """Keep what queued calls use until they have ended."""
        gpu = self._world.gpu
        assert gpu is not None
        gpu.retire(self, None if self.captured else self.ended)

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
        self._wait_for_calls()
        self._raise_found()

    def close(self) -> None:
        self.synchronize()

    def raise_pending(self) -> None:
        """Raise what the device has found wrong so far, without waiting for it. Ranks that are
        threads of one process do so together, where they meet before a call. Where the stream is
        captured, later."""
        if self._world.shares_process and self._report.kind != "stopped":
            return
        if not self._cp.cuda.get_current_stream().is_capturing():
            self._raise_found()

    def check_running(self, prefix: str) -> None:
        """As `World.check_running`."""
        try:
            self._world.check_running(prefix)
        except CometError as error:
            if self._last_operation == "backward":
                tell_unspecified(error)
            raise

    def _wait_for_calls(self) -> None:
        gpu = self._world.gpu
        if gpu is not None and gpu.last_call is not None:
            gpu.last_call.synchronize()

    def _raise_found(self) -> None:
        error = self._report.error()
        if error is not None:
            raise error

    # ---- the stages of a call ---------------------------------------------------------------

    @contextlib.contextmanager
    def _guard(self, operation: str) -> Iterator[None]:
        """Around all of a call: stops the world if this rank raises, also before anything is
        launched."""
        try:
            yield
        except CallNotBegun:
            raise
        except BaseException as error:
            if operation == "backward":
                tell_unspecified(error)
            self.stop_world(error, operation)
            raise

    def stop_world(self, error: BaseException, operation: str) -> None:
        """This rank raises in a call what its peers do not know of, while they wait for it: unless
        they have told it, or it captures a graph."""
        capturing = False
        with contextlib.suppress(Exception):  # of a broken device
            capturing = bool(self._cp.cuda.get_current_stream().is_capturing())
        if not capturing and not self._world.stopped:
            self._world.stop_for(error, f" in a {operation} of layer {self._layer}")

    @contextlib.contextmanager
    def _launching(
        self, operation: str, capturing: bool, buffers: tuple[Any, ...] = ()
    ) -> Iterator[None]:
        """Around a call's launches: calls of a world follow each other, whatever their streams.

        Not so in a graph: its owner orders replays, and `buffers` are kept for them."""
        gpu, stream = self._world.gpu, self._cp.cuda.get_current_stream()
        assert gpu is not None
        if capturing:
            yield
            self.captured.append(buffers)
            return
        self._begin()
        self._last_operation = operation
        if gpu.last_call is not None:
            stream.wait_event(gpu.last_call)
        try:
            yield
        finally:  # what was launched before an error runs on
            self.ended.record(stream)
            gpu.last_call = self.ended
        self._meet()

    def _begin(self) -> None:
        """Ranks that are threads of one process meet, and raise together what one of them has found
        on its device: what stops nothing all find, sooner or later."""
        world, report = self._world, self._report
        if not world.shares_process:
            return
        kinds = world.allgather(report.kind, purpose="the start of a call")
        if not any(kinds):
            return
        self._wait_for_calls()
        self._cp.cuda.get_current_stream().synchronize()
        error = report.error()
        if error is None:
            rank, kind = next((rank, kind) for rank, kind in enumerate(kinds) if kind)
            error = CometError(
                f"an earlier call failed on rank {rank} ({kind}), and not on this one"
            )
            error.relayed = True
        raise CallNotBegun(error)

    def _meet(self) -> None:
        """Where ranks are threads of one process, they meet before a call, after it, and before
        what waits for a peer and comes after something that may wait for the whole device
        (allocate, load a kernel): that could hold up a kernel that a peer's kernel waits for. On
        GPUs of their own too: CUDA calls of one process wait for each other, and memory that
        peers reach is given back only when they rest."""
        if self._world.shares_process:
            self._world.allgather(None, purpose="the end of a call")

    def _end(self, call: Record) -> None:
        self._finish((self._num_sms,), _THREADS, call)

    def _group_rows(self, plan: Any) -> list[tuple[int, int]]:
        """Waits for the verdict: rows [begin, end) of each expert; empty if the call is over."""
        runtime, stream = self._cp.cuda.runtime, self._cp.cuda.get_current_stream()
        kind = runtime.memcpyDeviceToHost
        for target, source in ((self._verdict, self._state), (self._offsets, plan.expert_offsets)):
            runtime.memcpyAsync(
                target.ctypes.data, source.data.ptr, target.nbytes, kind, stream.ptr
            )
        stream.synchronize()
        if not self._verdict["ok"][0]:
            return []
        return [(int(a), int(b)) for a, b in itertools.pairwise(self._offsets)]

    def _combine(self, call: Record, between: Callable[[], None]) -> None:
        """Push, then `between`, which covers the exchange, then add up at home."""
        self._push(call)
        between()
        self._add_up(call)

    # ---- memory -----------------------------------------------------------------------------

    def _ok_address(self) -> int:
        """Of CallState.ok, by which a GEMM knows that there is something to do."""
        return int(self._state.data.ptr) + call_state_dtype.fields["ok"][1]  # type: ignore[index]

    def _out_of_heap(self, array: Any, name: str) -> Any:
        """The array, or a copy of one that lies in the heap and not where it is to be put: publish
        copies in parallel, and would read what it has overwritten."""
        begin, end = self.buffer_place()
        address = array.data.ptr
        if address + array.nbytes <= begin or address >= end:
            return array
        entry = self._heap.table[name]
        own = self._world.segment(entry.segment, self._world.rank) + entry.offset
        return array if address == own else array.copy()

    def _own(self, name: str, shape: tuple[int, ...], dtype: np.dtype) -> Any:
        """This rank's array of the heap, as CuPy's."""
        entry, cp = self._heap.table[name], self._cp
        address = self._world.segment(entry.segment, self._world.rank) + entry.offset
        memory = cp.cuda.UnownedMemory(address, entry.nbytes, self._world)
        return cp.ndarray(shape, dtype, cp.cuda.MemoryPointer(memory, 0))


_NO_TURNS = Record(turns_params)
