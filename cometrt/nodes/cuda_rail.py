"""`CudaRail`: what a call over several nodes queues around the calls of its node's layer.

With one slice everything goes to the call's stream. With more, transfers go to a stream of their
own (`side`), and events order the two. Nothing waits on the host. Each rank sends the rows of
`MoESpec.crossing_tokens` tokens, since no host knows the numbers of tokens of other ranks. Where
only wanted tokens cross, `rail_choose` gives them slots (`nodes.crossing`).
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
from cometrt.specs import MoESpec
from cometrt.world.nodes import NodesWorld
from cometrt.world.operations import OPERATIONS
from cometrt.world.partitions import auxiliary_stream, num_sms

OUTCOMES = ("", "held", "failed", "stopped")  # RailOutcomeKind of nodes/rail_params.cuh
_PLANNING = ("forward", "plan")  # operations that make a plan
_STREAM = 3  # of auxiliary_stream: nobody else's
_TOKENS, _PARTIALS = 1, 2  # RailParams::begins

Transfer = tuple[int, int, int]  # (node, address, bytes)


class CudaRail:
    """The rail of one layer on one rank. R: `RailSlices.rows`.

    Attributes:
        all_ids, all_weights: [R, K], the tables of the rail for this node's experts.
        slots: [N, max_tokens] of the current call, as in `Residuals`; None: all tokens cross.
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
        self._pack, self._localize, self._outcome, self._step, self._add = load_kernels(
            "nodes/rail.cu", "rail_pack", "rail_localize", "rail_outcome", "rail_step", "rail_add"
        )
        (self._choose,) = load_kernels("nodes/rail_choose.cu", "rail_choose")
        self._progress = int(executor.queue.planner.progress.data.ptr)
        self._ctas = 4 * num_sms()
        self._params, self._filled_for = ParamStruct(params_dtype), (-1, -1)
        self._several = slices.count > 1
        self._side = auxiliary_stream(_STREAM) if self._several else None
        self._arrived: list[Any] = []  # events of the current call, by part
        self._sent: Any = None
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
            "part_tokens": slices.part_tokens if self._several else 0,
            "crossing": slices.crossing,
        }
        self.slots: Any = None
        self._wanted: WantedTokens | None = None
        if slices.wanted_only:
            self._wanted = WantedTokens(slices, self._message_bytes, self._row_bytes)
            self._fixed |= self._wanted.fields

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
        fields, own, wanted_rows = self._begin(), None, None
        if self._wanted and ids is not None:
            slots = self._wanted.new_slots()
        self.slots = slots
        if rows is not None:
            rows = self._out_of(all_rows, rows)
            wanted_rows = rows if self._wanted else None
            own = self.own_rows(all_rows)[:num_tokens]
            if self._several and num_tokens == self._spec.max_tokens:
                own, rows = rows, None  # sent from where they are
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
        self._run(self._pack, begins=_TOKENS)
        if self._several and ids is not None and not self._wanted:
            self._run(self._localize, own=1)
        self._sent = own, slots  # the memory is not free until the next call begins
        if own is None:
            self._arrive(None)
        else:
            sent = own if rows is None else self.own_rows(all_rows)  # of max_tokens rows
            self._arrive((sent.data.ptr, all_rows.data.ptr))
        return own

    def _arrive(self, of_rows: tuple[int, int] | None) -> None:
        """Queue all transfers of tokens and dy. of_rows: where they are sent from if all cross, and
        `all_rows`. The first also brings messages."""
        slices, nbytes, last = self._slices, self._row_bytes, self._slices.parts - 1
        side = self._fork()
        self._arrived = []
        for part in range(slices.parts):
            sends, receives = [], []
            tokens = slices.slots_of(part)
            for node in self._other_nodes():
                if part == 0:
                    message = self._messages.data.ptr, self._message_bytes
                    own = _part(*message, slices.node)
                    sends.append((node, *(self._wanted.message_to(node) if self._wanted else own)))
                    receives.append((node, *_part(*message, node)))
                if of_rows is not None and tokens:
                    begin, to = of_rows
                    begin = self._wanted.rows_to(node) if self._wanted else begin
                    size = nbytes * len(tokens)
                    sends.append((node, begin + nbytes * tokens[0], size))
                    row = slices.row_of(node, tokens[0])
                    receives.append((node, to + nbytes * row, size))
            if sends:
                self._nccl.transfer(sends, receives, side)
            begins = _TOKENS if part < last else 0
            if part == 0:
                own_too = 0 if self._several or self._wanted else 1
                of = {"own": own_too, "others": 1}
                self._run(self._localize, side, ends=1, begins=begins, **of)
            else:
                self._run(self._step, side, ends=1, begins=begins)
            self._arrived.append(self._record(side))

    def begin_slice(self, of: RailSlice) -> None:
        """What is queued from here on finds the tokens of the slice."""
        if self._several and of.part is not None:
            self._cp.cuda.get_current_stream().wait_event(self._arrived[of.part])

    def end_slice(self, index: int, of: RailSlice, *, rows: bool, dweights: bool) -> None:
        """The node's call of a slice has been queued: what it has put into `results` and `dweights`
        returns. With one slice the outcome does, too."""
        fields = self._params.fields
        fields["slice"] = index
        if of.part is None:
            self._run(self._outcome)
            return
        self._run(self._outcome, begins=0 if self._several else _PARTIALS)
        results = []  # (from, to, bytes of a row)
        if rows:
            results.append((self.results.data.ptr, self.rows.data.ptr, self._row_bytes))
        if dweights:
            of_pairs = self.dweights.data.ptr, self._returned_dweights.data.ptr
            results.append((*of_pairs, 4 * self._spec.topk))
        slices, tokens = self._slices, self._slices.slots_of(of.part)
        sends: list[Transfer] = []
        receives: list[Transfer] = []
        for node in self._other_nodes() if tokens else ():
            row = slices.row_of(node, tokens[0])
            for begin, to, nbytes in results:
                sends.append((node, begin + nbytes * row, nbytes * len(tokens)))
                receives.append((node, to + nbytes * row, nbytes * len(tokens)))
        if not self._several:
            self._exchange_outcomes(sends, receives, self._stream())
        elif sends:
            side = self._fork()
            self._run(self._step, side, begins=_PARTIALS)
            self._nccl.transfer(sends, receives, side)
            self._run(self._step, side, ends=1)

    def end(self, out: Any = None, out_dweight: Any = None, epochs: Any = ()) -> None:
        """End a call: add the partial sums of this rank's tokens into out [T, H] and
        out_dweight [T, K].

        Args:
            epochs: arrays [1] of a forward or a plan, by slice.
        """
        stream = self._cp.cuda.get_current_stream()
        if self._several:
            side = self._fork()
            self._run(self._step, side, begins=_PARTIALS)
            self._exchange_outcomes([], [], side)
            self._run(self._step, side, ends=1)
            stream.wait_event(self._record(side))
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
        self._run(self._add, ends=0 if self._several else 1)

    # ---- queueing ---------------------------------------------------------------------------

    def _run(self, kernel: Any, stream: int | None = None, **launch: int) -> None:
        """Launch a kernel; `launch`: fields of this launch alone, others of them are 0."""
        fields = self._params.fields
        for name in ("ends", "begins", "own", "others"):
            fields[name] = launch.get(name, 0)
        ctas = 1 if kernel in (self._outcome, self._step) else self._ctas
        if kernel is self._choose:
            ctas = self._slices.nodes
        kernel(stream or self._stream(), ctas, self._params)

    def _exchange_outcomes(
        self, sends: list[Transfer], receives: list[Transfer], stream: int
    ) -> None:
        outcomes = self._outcomes.data.ptr, outcome_dtype.itemsize
        own = _part(*outcomes, self._slices.node)
        sends = sends + [(node, *own) for node in self._other_nodes()]
        receives = receives + [(node, *_part(*outcomes, node)) for node in self._other_nodes()]
        self._nccl.transfer(sends, receives, stream)

    def _other_nodes(self) -> list[int]:
        return [node for node in range(self._slices.nodes) if node != self._slices.node]

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


def _part(begin: int, nbytes: int, node: int) -> tuple[int, int]:
    """(address, bytes) of a node's part of an array [N]."""
    return begin + node * nbytes, nbytes
