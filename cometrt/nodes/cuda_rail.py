"""`CudaRail`: what a call over several nodes queues around the calls of its node's layer.

With one slice everything goes to the call's stream. With more, or with late parts
(`nodes.cuda_late`), transfers go to a stream of their own (`side`), and events order the two.
Nothing waits on the host. Each rank sends the rows of `MoESpec.crossing_tokens` tokens, since no
host knows the numbers of tokens of other ranks. Where only wanted tokens cross, `rail_choose` gives
them slots (`nodes.crossing`).
"""

from __future__ import annotations

from typing import Any

from cometrt.cuda.exchange_params import world_params
from cometrt.cuda.executor import CudaExecutor
from cometrt.cuda.report import pinned
from cometrt.kernels.launch import load_kernels
from cometrt.kernels.params import ParamStruct
from cometrt.kernels.rail_params import header_dtype, outcome_dtype, params_dtype, report_dtype
from cometrt.nodes.cuda_crossing import WantedTokens
from cometrt.nodes.slices import RailSlice, RailSlices
from cometrt.nodes.transfers import RailTransfers, Transfer
from cometrt.specs import MoESpec
from cometrt.world.nodes import NodesWorld
from cometrt.world.operations import OPERATIONS
from cometrt.world.partitions import auxiliary_stream, num_sms

OUTCOMES = ("", "held", "failed", "stopped")  # RailOutcomeKind of nodes/rail_params.cuh
_PLANNING = ("forward", "plan")  # operations that make a plan
_STREAM, _FIRST = 3, -5  # number and priority of auxiliary_stream: nobody else's
TOKENS, PARTIALS = 1, 2  # RailParams::begins


class CudaRail:
    """The rail of one layer on one rank. R: `RailSlices.rows`.

    Attributes:
        all_ids, all_weights: [R, K], the tables of the rail for this node's experts.
        slots: [N, max_tokens] of the current call, as in `Residuals`; None: all tokens cross.
        read: arrays of the caller that the current call reads, and its slots.
        results: [R, H], results of the node's calls.
        rows: [R, H]: gathered tokens or dy, and behind the node's calls returned partial sums.
        dweights: [R, K] float32, results of the node's backward.
        report: the first call that failed on another node.
    """

    def __init__(
        self,
        world: NodesWorld,
        spec: MoESpec,
        slices: RailSlices,
        layer: int,
        executor: CudaExecutor,
    ) -> None:
        import cupy as cp

        assert world.nccl is not None
        self._cp, self._world, self._spec, self._nccl = cp, world, spec, world.nccl
        self._slices, nodes = slices, world.nodes
        pairs = (slices.rows, spec.topk)
        crossing_pairs = slices.crossing * spec.topk
        self._message_bytes = header_dtype.itemsize + -(-8 * crossing_pairs // 16) * 16
        self._messages = cp.zeros(nodes * self._message_bytes, cp.uint8)
        self._outcomes = cp.zeros(nodes * outcome_dtype.itemsize, cp.uint8)
        # Rows that belong to no token keep these ids.
        self.all_ids, self.all_weights = cp.full(pairs, -1, cp.int32), cp.zeros(pairs, cp.float32)
        self.results, self.rows = (
            cp.ndarray((slices.rows, spec.hidden), spec.numpy_dtype) for _ in range(2)
        )
        self.dweights, self._returned_dweights = (cp.ndarray(pairs, cp.float32) for _ in range(2))
        self.report = pinned(report_dtype)
        self._row_bytes = spec.hidden * spec.numpy_dtype.itemsize
        names = "pack localize outcome ready wait step add".split()
        (
            self._pack,
            self._localize,
            self._outcome,
            self._ready,
            self._wait,
            self._step,
            self._add,
        ) = load_kernels("nodes/rail.cu", *(f"rail_{name}" for name in names))
        (self._choose,) = load_kernels("nodes/rail_choose.cu", "rail_choose")
        self._heap = executor.buffer_range
        self._progress = int(executor.queue.planner.progress.data.ptr)
        self._ctas = 4 * num_sms()
        self._params, self._filled_for = ParamStruct(params_dtype), (-1, -1)
        self._several = slices.count > 1
        self._side = auxiliary_stream(_STREAM, _FIRST) if slices.overlaps else None
        self._arrived: list[Any] = []  # events of the current call, by part
        self.read: tuple[Any, ...] = ()
        self._fixed = {
            "layer": layer,
            "spec_hash": spec.digest(),
            "state": int(executor.queue.state.data.ptr),
            "report": int(self.report.ctypes.data),
            "steps": int(self._nccl.steps.ctypes.data),
            "messages": self._messages.data.ptr,
            "message_bytes": self._message_bytes,
            "all_ids": self.all_ids.data.ptr,
            "all_weights": self.all_weights.data.ptr,
            "outcomes": self._outcomes.data.ptr,
            "nodes": nodes,
            "node": world.node_index,
            "max_tokens": spec.max_tokens,
            "topk": spec.topk,
            "hidden": spec.hidden,
            "num_experts": spec.num_experts,
            "part_tokens": slices.part_tokens if slices.overlaps else 0,
            "crossing": slices.crossing,
            "part_sums": int(executor.queue.part_sums.data.ptr),
            "num_parts": slices.late_parts,
            "local_experts": spec.num_experts * spec.tp // world.size,
        }
        self.slots: Any = None
        self._wanted: WantedTokens | None = None
        if slices.wanted_only:
            self._wanted = WantedTokens(slices, self._message_bytes, self._row_bytes)
            self._fixed |= self._wanted.fields
        sizes = self._row_bytes, self._message_bytes
        self._transfers = RailTransfers(slices, *sizes, self._wanted)

    # ---- a call, in this order --------------------------------------------------------------

    def begin(
        self,
        operation: str,
        num_tokens: int,
        rows: Any = None,
        all_rows: Any = None,
        ids: Any = None,
        weights: Any = None,
        forward: int = 0,
        slots: Any = None,
    ) -> Any:
        """Begin a call: gather rows [num_tokens, H] into all_rows [R, H], and the tables into
        `all_ids` and `all_weights`.

        Args:
            forward: number of a backward's forward, or of a planned forward's plan.
            slots: of that forward or plan, as in `Residuals`.

        Returns:
            where this rank's rows are for the call's slices.
        """
        fields, own = self._begin(), None
        if self._wanted and ids is not None:
            slots = self._wanted.new_slots()
        self.slots = slots
        if rows is not None:
            rows = self._out_of(all_rows, rows)
        self.read, wanted_rows = (rows, ids, weights, slots), rows if self._wanted else None
        if rows is not None:
            own, rows = self._place(rows, all_rows)
        arrays = {
            "rows": rows,
            "all_rows": all_rows,
            "ids": ids,
            "weights": weights,
            "slots": slots,
            "wanted_rows": wanted_rows,
        }
        self._set(arrays)
        fields["forward"] = forward
        fields["operation"] = OPERATIONS.index(operation)
        fields["progress"] = self._progress if operation in _PLANNING else 0
        fields["num_tokens"] = num_tokens
        fields["id_bytes"] = 0 if ids is None else ids.dtype.itemsize
        if self._wanted and ids is not None:
            self._run(self._choose)
        self._run(self._pack, begins=TOKENS)
        if self._several and ids is not None and not self._wanted:
            self._run(self._localize, own=1)
        if own is None:
            self._arrive(None)
        else:
            sent = own if rows is None else self.own_rows(all_rows)  # of max_tokens rows
            self._arrive((sent.data.ptr, all_rows.data.ptr))
        return own

    def _place(self, rows: Any, all_rows: Any) -> tuple[Any, Any]:
        """Where this rank's rows are for the call's slices; what `rail_pack` copies there."""
        if self._several and len(rows) == self._spec.max_tokens:
            return rows, None  # sent from where they are
        return self.own_rows(all_rows)[: len(rows)], rows

    def _arrive(self, of_rows: tuple[int, int] | None) -> None:
        """Queue all transfers of tokens and dy. of_rows: where they are sent from if all cross, and
        `all_rows`. The first also brings messages."""
        side, last = self._fork(), self._slices.parts - 1
        self._arrived = []
        for part in range(self._slices.parts):
            transfer = Transfer([], [])
            if part == 0:
                transfer += self._transfers.of_messages(self._messages.data.ptr)
            if of_rows is not None:
                transfer += self._transfers.of_tokens(part, *of_rows)
            self._transfer(transfer, side)
            begins = TOKENS if part < last else 0
            if part == 0:
                own_too = 0 if self._several or self._wanted else 1
                of = {"own": own_too, "others": 1}
                self._run(self._localize, side, ends=1, begins=begins, **of)
            else:
                self._run(self._step, side, ends=1, begins=begins)
            self._arrived.append(self._record(side))

    def begin_slice(self, of: RailSlice) -> None:
        """What is queued from here on finds the tokens of the slice."""
        if self._side is not None and of.part is not None:
            self._cp.cuda.get_current_stream().wait_event(self._arrived[of.part])

    def end_slice(self, index: int, of: RailSlice, *, rows: bool, dweights: bool) -> None:
        """The node's call of a slice has been queued: what it has put into `results` and `dweights`
        returns. With one slice the outcome does, too."""
        fields = self._params.fields
        fields["slice"] = index
        if of.part is None:
            self._run(self._outcome)
            return
        self._run(self._outcome, begins=0 if self._several else PARTIALS)
        transfer = self._transfers.of_results(of.part, self._results(rows, dweights))
        if not self._several:
            self._transfer(transfer + self._of_outcomes(), self._stream())
        elif transfer:
            side = self._fork()
            self._run(self._step, side, begins=PARTIALS)
            self._transfer(transfer, side)
            self._run(self._step, side, ends=1)

    def _results(self, rows: bool, dweights: bool) -> list[tuple[int, int, int]]:
        """(from, to, bytes of a row) of what returns."""
        results = []
        if rows:
            results.append((self.results.data.ptr, self.rows.data.ptr, self._row_bytes))
        if dweights:
            of_pairs = self.dweights.data.ptr, self._returned_dweights.data.ptr
            results.append((*of_pairs, 4 * self._spec.topk))
        return results

    def end(self, out: Any = None, out_dweight: Any = None, epochs: Any = ()) -> None:
        """End a call: add the partial sums of this rank's tokens into out [T, H] and
        out_dweight [T, K].

        Args:
            epochs: arrays [1] of a forward or a plan, by slice.
        """
        if self._side is not None:
            self._exchange_outcomes()
            self.join()
        self._set_results(out, out_dweight, epochs)
        self._run(self._add, ends=1, own=1, others=1)

    def _exchange_outcomes(self) -> None:
        side = self._fork()
        self._run(self._step, side, begins=PARTIALS)
        self._transfer(self._of_outcomes(), side)

    def _set_results(self, out: Any, out_dweight: Any, epochs: Any) -> None:
        """The fields of `rail_add`."""
        arrays = {"out": out, "out_dweight": out_dweight}
        if out is not None:
            arrays |= {"partials": self.results, "returned": self.rows}
        if out_dweight is not None:
            arrays |= {
                "dweight_partials": self.dweights,
                "returned_dweight": self._returned_dweights,
            }
        self._set(arrays)
        fields = self._params.fields
        fields["num_epochs"] = len(epochs)
        for slice_idx, epoch in enumerate(epochs):
            fields["epochs"][0, slice_idx] = epoch.data.ptr

    def join(self) -> None:
        """What is queued from here on is behind all transfers that are queued now."""
        if self._side is not None:
            self._cp.cuda.get_current_stream().wait_event(self._record(int(self._side.ptr)))

    # ---- queueing ---------------------------------------------------------------------------

    def _run(self, kernel: Any, stream: int | None = None, **launch: int) -> None:
        """Launch a kernel; `launch`: fields of this launch alone, others of them are 0."""
        fields = self._params.fields
        for name in ("ends", "begins", "own", "others", "part"):
            fields[name] = launch.get(name, 0)
        small = self._outcome, self._ready, self._wait, self._step
        ctas = 1 if kernel in small else self._ctas
        if kernel is self._choose:
            ctas = self._slices.nodes
        kernel(stream or self._stream(), ctas, self._params)

    def _transfer(self, transfer: Transfer, stream: int) -> None:
        if transfer:
            self._nccl.transfer(*transfer, stream)

    def _of_outcomes(self) -> Transfer:
        return self._transfers.of_array(self._outcomes.data.ptr, outcome_dtype.itemsize)

    def _stream(self) -> int:
        return int(self._cp.cuda.get_current_stream().ptr)

    def _fork(self) -> int:
        """The stream of transfers, behind what is queued on the call's stream now."""
        stream = self._cp.cuda.get_current_stream()
        if self._side is None:
            return int(stream.ptr)
        event = self._cp.cuda.Event(disable_timing=True)
        event.record(stream)
        self._side.wait_event(event)
        return int(self._side.ptr)

    def _record(self, side: int) -> Any:
        """An event behind what is queued for transfers now."""
        if self._side is None:
            return None
        event = self._cp.cuda.Event(disable_timing=True)
        event.record(self._side)
        return event

    # ---- params -----------------------------------------------------------------------------

    def own_rows(self, all_rows: Any) -> Any:
        """This rank's part of all_rows [R, H]."""
        begin = self._slices.row_of(self._slices.node)
        return all_rows[begin : begin + self._spec.max_tokens]

    def _out_of(self, all_rows: Any, rows: Any) -> Any:
        """The rows, or a copy if they lie in all_rows at another place than their own."""
        begin, address = all_rows.data.ptr, rows.data.ptr
        outside = address + rows.nbytes <= begin or address >= begin + all_rows.nbytes
        own = begin + self._row_bytes * self._slices.row_of(self._slices.node)
        return rows if outside or address == own else rows.copy()

    def _set(self, arrays: dict[str, Any]) -> None:
        for name, array in arrays.items():
            self._params.fields[name] = 0 if array is None else array.data.ptr

    def _begin(self) -> Any:
        """The fields of a new call's params."""
        node, params = self._world.node, self._params
        state = (node.generation, node.regions.version)
        if state != self._filled_for:
            params.fields["world"] = world_params(node)
            for name, value in self._fixed.items():
                params.fields[name] = value
            self._filled_for = state
        return params.fields
