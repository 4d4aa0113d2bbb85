"""Forward and backward of one layer on CUDA, mode "sequential": dispatch, expert GEMMs, combine,
each its own launch; the protocol of kernels_cu/README.md across ranks.

cuBLAS, which backward always uses, has to know the experts' rows on the host: such a call waits
once for its plan. The engine does not.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from cometrt.cuda.experts import CublasExperts, EngineExperts
from cometrt.cuda.fused import FusedForward
from cometrt.cuda.planner import DevicePlanner
from cometrt.cuda.report import OPERATIONS, Report
from cometrt.errors import CometError
from cometrt.heap import SymmetricHeap
from cometrt.kernels.launch import load_kernels
from cometrt.kernels.params import (
    CALL_TABLES,
    HEAP_OFFSETS,
    call_dtype,
    call_state_dtype,
    geometry_record,
    pace_record,
)
from cometrt.plan import Plan, PlanShape
from cometrt.plan.reference import make_plan
from cometrt.plan.routing import RoutingTables
from cometrt.saved import Saved
from cometrt.specs import Gradients
from cometrt.trace import Tracer
from cometrt.world import World
from cometrt.world.layout import world_dtype
from cometrt.world.partitions import num_sms

_THREADS = 256
_PULL_WARPS = 4  # kPullWarps of rows.cu
_SLOT_BYTES = 200 * 1024  # of shared memory for rows in flight


class CudaExecutor:
    def __init__(self, world: World, shape: PlanShape, layer: int, mode: str) -> None:
        """Collective."""
        import cupy as cp

        self._cp, self._world, self._shape, self._layer = cp, world, shape, layer
        geometry, spec = shape.geometry, shape.geometry.spec
        if spec.dtype != "bfloat16":
            raise ValueError(f"dtype must be 'bfloat16' on device='cuda' (got {spec.dtype!r})")
        self._heap = SymmetricHeap(world, shape)
        self._planner = DevicePlanner(shape)
        pairs = (geometry.size, spec.max_tokens, spec.topk)
        self._ids, self._weights = cp.empty(pairs, cp.int32), cp.empty(pairs, cp.float32)
        self._num_tokens = cp.zeros(geometry.size, cp.int32)
        self._state = cp.zeros(call_state_dtype.itemsize, cp.uint8)
        self._ok = self._state.data.ptr + call_state_dtype.fields["ok"][1]  # type: ignore[index]
        self._publish, self._gather, self._verdict, self._poison = load_kernels(
            "exchange/publish.cu", "publish", "gather", "verdict", "poison"
        )
        self._dispatch, self._push, self._home_reduce = load_kernels(
            "exchange/rows.cu", "dispatch", "push", "home_reduce"
        )
        self._cublas = CublasExperts(shape)
        self._engine = EngineExperts(shape) if shape.config.gemm == "engine" else None
        self._links = cp.zeros(2, cp.uint64)  # clocks of what comes and of what leaves
        clocks = self._links.data.ptr
        self._pull_pace, self._push_pace = (
            pace_record(clock, world.link) for clock in (clocks, clocks + 8)
        )
        self._fused = None
        if mode == "fused":
            self._fused = FusedForward(shape, self._pull_pace, self._push_pace)
        self._report = Report(world, geometry.local_experts)
        self._pending: CometError | None = None
        self._in_flight = False
        self._epoch_of_call()  # whatever that loads, now
        cp.cuda.get_current_stream().synchronize()
        world.barrier()

    # ---- the calls --------------------------------------------------------------------------

    def buffer(self) -> Any:
        spec = self._shape.geometry.spec
        return self._own("x", (spec.max_tokens, spec.hidden), spec.numpy_dtype)

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
        with self._guard():
            return self._forward(x, ids, weights, w_up, w_down, training, out)

    def _forward(
        self, x: Any, ids: Any, weights: Any, w_up: Any, w_down: Any, training: bool, out: Any
    ) -> tuple[Any, ...] | None:
        cp, geometry, spec = self._cp, self._shape.geometry, self._shape.geometry.spec
        tokens = None
        if training and spec.save == "z":
            tokens = cp.zeros((spec.max_tokens, spec.hidden), spec.numpy_dtype)
            tokens[: len(x)] = x
        call = self._call("forward", len(x), x=x, out=out)
        call["weighted"] = 1
        for name, array in (("ids", ids), ("weights", weights)):
            call[name] = array.data.ptr
        call["ids_are_64"] = ids.dtype.itemsize == 8
        for name, array in (
            ("all_ids", self._ids),
            ("all_weights", self._weights),
            ("all_num_tokens", self._num_tokens),
            ("errors", self._planner.errors),
        ):
            call[name] = array.data.ptr
        x_rows, engine = self._rows(spec.hidden), self._engine
        z = self._rows(geometry.up_columns) if training or engine is None else None
        a, o = self._rows(geometry.local_intermediate), self._rows(spec.hidden)
        plan, rows = self._planner.new_plan(), None
        if self._fused is not None:
            self._fused.begin(call)
        started = self._start(call)
        if started:
            self._planner.plan(self._ids, self._weights, self._num_tokens, plan)
            self._verdict((1,), 1, call)
            if engine is None:
                rows = self._group_rows(plan)
        self._set_plan(call, plan)
        if started and self._fused is not None:
            call["pull_at"] = self._heap.table["x"].offset
            call["rows"], call["partial_rows"] = x_rows.data.ptr, o.data.ptr
            self._fused.layer0(call, plan, self._ok, x_rows, w_up, z, a)
            if self._meet():
                self._fused.layer1(call, a, w_down, o)
        elif started and (rows or engine is not None):
            self._pull(call, "x", x_rows)
            if rows:
                self._cublas.forward(plan, rows, x_rows, w_up, w_down, z, a, o)
            elif engine is not None:
                engine.forward(plan, self._ok, x_rows, w_up, w_down, z, a, o)
            self._combine(call, o)
        self._finish(call)
        if not training:
            return None
        return Saved.pack(
            shape=self._shape,
            layer=self._layer,
            num_tokens=len(x),
            epoch=self._epoch_of_call(),
            world=self._world.identity,
            x=x_rows if tokens is None else tokens,
            z=z,
            plan=plan,
            w_up=w_up,
            w_down=w_down,
        )

    def backward(
        self, dy: Any, saved: Saved, *, out: Gradients, accumulate: bool, tracer: Tracer
    ) -> None:
        with self._guard():
            self._backward(dy, saved, out, accumulate)

    def _backward(self, dy: Any, saved: Saved, out: Gradients, accumulate: bool) -> None:
        cp, geometry, spec = self._cp, self._shape.geometry, self._shape.geometry.spec
        pulls_again = spec.save == "z"
        call = self._call("backward", len(dy), x=saved.x if pulls_again else None, out=out.x)
        call["dy"], call["forward_epoch"] = dy.data.ptr, saved.epoch.data.ptr
        call["out_dweight"] = out.topk_weights.data.ptr
        dy_rows, dx_rows = self._rows(spec.hidden), self._rows(spec.hidden)
        x_rows = self._rows(spec.hidden) if pulls_again else saved.x
        width = geometry.local_intermediate
        da = cp.empty((self._shape.capacity, width), cp.float32)
        dz, weighted_a = self._rows(geometry.up_columns), self._rows(width)
        dweight_rows = cp.empty(self._shape.capacity, cp.float32)
        rows = []
        if self._start(call):
            self._verdict((1,), 1, call)
            rows = self._group_rows(saved.plan)
        self._set_plan(call, saved.plan)
        if rows:
            self._pull(call, "dy", dy_rows)
            if pulls_again:  # before the first partial of dx leaves
                self._pull(call, "x", x_rows)
            self._cublas.grad_rows(saved, rows, dy_rows, da, dz, weighted_a, dweight_rows, dx_rows)
            call["dweight_rows"] = dweight_rows.data.ptr
            self._combine(call, dx_rows, between=lambda: self._cublas.grad_weights(
                rows, dz, x_rows, dy_rows, weighted_a, out, accumulate
            ))  # fmt: skip
        self._finish(call)

    def synchronize(self) -> None:
        """Wait for this layer's calls; raise what they have not raised yet."""
        self.raise_pending()

    def close(self) -> None:
        self.synchronize()

    def raise_pending(self) -> None:
        """Raise what the last call found. Waits for its end: the next one uses its tables."""
        if self._in_flight:
            self._report.event.synchronize()
            self._in_flight = False
            if self._pending is None:
                self._pending = self._report.stop_found()
            if self._pending is None and not self._report.ok:
                self._pending = self._routing_found()
        error, self._pending = self._pending, None
        if error is not None:
            raise error

    @contextlib.contextmanager
    def _guard(self) -> Iterator[None]:
        """Stop the world if this rank raises what its peers do not know of."""
        try:
            yield
        except CometError:
            raise
        except BaseException as error:
            self._world.stop_for(error, f" in a call of layer {self._layer}")
            raise

    # ---- the stages of a call ---------------------------------------------------------------

    def _call(self, operation: str, num_tokens: int, *, x: Any, out: Any) -> np.ndarray:
        """The params of this call's kernels, as far as they are known."""
        world, shape = self._world, self._shape
        call = np.zeros(1, call_dtype)
        record = np.zeros(1, world_dtype)
        assert world.gpu is not None
        for peer in range(world.size):
            record["control"][0, peer] = world.gpu.control[peer]
            record["data"][0, peer] = world.segment("data", peer)
            record["flags"][0, peer] = world.segment("flags", peer)
        record["generation"] = world.generation
        record["timeout_ns"] = round(world.timeout_sec * 1e9)
        record["rank"], record["size"] = world.rank, world.size
        call["world"], call["g"] = record, geometry_record(shape)
        call["num_chunks"] = self._heap.table["partials_ready"].shape[-1]
        call["num_tokens"] = num_tokens
        call["chunk_columns"] = shape.config.chunks(shape.geometry.spec.hidden)[0][1]
        for field, name in HEAP_OFFSETS.items():
            call[field] = self._heap.table[name].offset
        call["operation"], call["layer"] = OPERATIONS.index(operation), self._layer
        call["spec_hash"] = shape.geometry.spec.digest()
        call["state"], call["out"] = self._state.data.ptr, out.data.ptr
        if x is not None:
            call["x"] = x.data.ptr
        return call

    def _start(self, call: np.ndarray) -> bool:
        """Publish and wait for all; False if ranks that share the GPU did not even meet."""
        gpu = self._world.gpu
        assert gpu is not None
        if gpu.last_call is not None:  # perhaps on another stream
            self._cp.cuda.get_current_stream().wait_event(gpu.last_call)
        self._state.data.memset_async(0, self._state.nbytes)
        if self._world.shares_gpu:
            # No copy of the caller's may still be queued: copies of all ranks share queues, and
            # one behind a waiting kernel would hold up the others.
            self._cp.cuda.get_current_stream().synchronize()
        if not self._meet():
            return False
        self._publish((num_sms(),), _THREADS, call)
        self._gather((self._world.size,), _THREADS, call)
        return True

    def _meet(self) -> bool:
        """Where ranks are threads on one GPU: before each kernel that waits for a peer, when all
        that it waits for has been launched. Else what a rank's host does meanwhile (allocate,
        or let cuBLAS load a kernel: both may wait for the whole device) could hold that up."""
        if not self._world.shares_gpu:
            return True
        try:
            self._world.allgather(None, purpose="a call")
        except CometError as error:
            self._pending = self._pending or error
            return False
        return True

    def _group_rows(self, plan: Any) -> list[tuple[int, int]]:
        """Waits for the verdict: rows [begin, end) of each expert; empty if the call is over."""
        self._report.copy(self._state, plan.expert_offsets)
        self._report.event.synchronize()
        if not self._report.ok:
            return []  # `raise_pending` finds out why
        offsets = self._report.expert_offsets
        return [(int(a), int(b)) for a, b in itertools.pairwise(offsets)]

    def _set_plan(self, call: np.ndarray, plan: Plan) -> None:
        for name in CALL_TABLES:
            call[name] = getattr(plan, name).data.ptr

    def _pull(self, call: np.ndarray, name: str, rows: Any) -> None:
        call["pull_at"], call["rows"] = self._heap.table[name].offset, rows.data.ptr
        row_bytes = 2 * self._shape.geometry.spec.hidden
        lanes = max(1, min(32, _SLOT_BYTES // row_bytes // _PULL_WARPS))
        self._dispatch(
            (num_sms(),),
            _THREADS,
            call,
            self._pull_pace,
            np.int32(lanes),
            shared_bytes=_PULL_WARPS * lanes * row_bytes,
        )

    def _combine(self, call: np.ndarray, rows: Any, between: Any = None) -> None:
        """Push, then `between`, which covers the exchange, then add up at home."""
        call["partial_rows"] = rows.data.ptr
        self._push((4 * num_sms(),), _THREADS, call, self._push_pace)
        if between is not None:
            between()
        blocks = self._shape.config.token_blocks(int(call["num_tokens"][0]))
        if self._meet() and blocks:
            self._home_reduce((blocks,), _THREADS, call)

    def _finish(self, call: np.ndarray) -> None:
        self._poison((num_sms(),), _THREADS, call)
        self._report.copy(self._state)
        self._in_flight = True
        assert self._world.gpu is not None
        self._world.gpu.last_call = self._report.event

    # ---- what the device has found ----------------------------------------------------------

    def _routing_found(self) -> CometError | None:
        """The planner's error, in the words of the NumPy planner over the same tables."""
        tables = RoutingTables(self._ids.get(), self._weights.get(), self._num_tokens.get())
        try:
            make_plan(tables, self._shape)
        except CometError as error:
            return error
        return None

    # ---- memory -----------------------------------------------------------------------------

    def _rows(self, columns: int) -> Any:
        dtype = self._shape.geometry.spec.numpy_dtype
        return self._cp.empty((self._shape.capacity, columns), dtype)

    def _own(self, name: str, shape: tuple[int, ...], dtype: np.dtype) -> Any:
        """This rank's array of the heap, as CuPy's."""
        entry, cp = self._heap.table[name], self._cp
        address = self._world.segment(entry.segment, self._world.rank) + entry.offset
        memory = cp.cuda.UnownedMemory(address, entry.nbytes, self._world)
        return cp.ndarray(shape, dtype, cp.cuda.MemoryPointer(memory, 0))

    def _epoch_of_call(self) -> Any:
        """[1] int64 on the device: CallState.epoch, copied in stream order."""
        offset = call_state_dtype.fields["epoch"][1]  # type: ignore[index]
        return self._state[offset : offset + 8].view(self._cp.int64).copy()
