"""`CudaRail`: what a call over several nodes queues around the call of its node's layer.

Everything goes to the call's stream, and nothing waits on the host. Each rank sends the rows of
max_tokens tokens, since no host knows the numbers of tokens of other ranks.
"""

from __future__ import annotations

from typing import Any

from cometrt.cuda.exchange_params import world_params
from cometrt.cuda.executor import CudaExecutor
from cometrt.cuda.report import pinned
from cometrt.kernels.launch import load_kernels
from cometrt.kernels.params import ParamStruct
from cometrt.kernels.rail_params import header_dtype, outcome_dtype, params_dtype, report_dtype
from cometrt.specs import MoESpec
from cometrt.world.nodes import NodesWorld
from cometrt.world.operations import OPERATIONS
from cometrt.world.partitions import num_sms

OUTCOMES = ("", "held", "failed", "stopped")  # RailOutcomeKind of nodes/rail_params.cuh
_PLANNING = ("forward", "plan")  # operations that make a plan


class CudaRail:
    """The rail of one layer on one rank.

    Attributes:
        all_ids, all_weights: [N * max_tokens, K], the tables of the rail for this node's experts.
        results: [N * max_tokens, H], results of the node's call.
        rows: the same size: gathered dy, and after the node's call returned partial sums.
        dweights: [N * max_tokens, K] float32, results of the node's backward.
        report: the first call that failed on another node.
    """

    def __init__(
        self, world: NodesWorld, spec: MoESpec, layer: int, executor: CudaExecutor
    ) -> None:
        import cupy as cp

        assert world.nccl is not None
        self._cp, self._world, self._spec, self._nccl = cp, world, spec, world.nccl
        nodes, tokens = world.nodes, world.nodes * spec.max_tokens
        pairs = (tokens, spec.topk)
        own_pairs = spec.max_tokens * spec.topk
        self._message_bytes = header_dtype.itemsize + -(-8 * own_pairs // 16) * 16
        self._messages = cp.zeros(nodes * self._message_bytes, cp.uint8)
        self._outcomes = cp.zeros(nodes * outcome_dtype.itemsize, cp.uint8)
        self.all_ids, self.all_weights = cp.zeros(pairs, cp.int32), cp.zeros(pairs, cp.float32)
        self.results, self.rows = (
            cp.ndarray((tokens, spec.hidden), spec.numpy_dtype) for _ in range(2)
        )
        self.dweights, self._returned_dweights = (cp.ndarray(pairs, cp.float32) for _ in range(2))
        self.report = pinned(report_dtype)
        self._row_bytes = spec.max_tokens * spec.hidden * 2
        self._pack, self._localize, self._outcome, self._add = load_kernels(
            "nodes/rail.cu", "rail_pack", "rail_localize", "rail_outcome", "rail_add"
        )
        self._progress = int(executor.queue.planner.progress.data.ptr)
        self._ctas = 4 * num_sms()
        self._params, self._filled_for = ParamStruct(params_dtype), (-1, -1)
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
        }

    def gather(
        self,
        operation: str,
        num_tokens: int,
        rows: Any = None,
        all_rows: Any = None,
        ids: Any = None,
        weights: Any = None,
        forward_epoch: Any = None,
    ) -> None:
        """Begin a call: gather rows [num_tokens, H] into all_rows [N * max_tokens, H], and the
        tables into `all_ids` and `all_weights`.

        Args:
            forward_epoch: array [1]; as for `HostRail.gather`.
        """
        fields, stream = self._begin(), self._cp.cuda.get_current_stream().ptr
        if rows is not None:
            rows = self._out_of(all_rows, rows)
        arrays = {
            "rows": rows,
            "all_rows": all_rows,
            "ids": ids,
            "weights": weights,
            "forward_epoch": forward_epoch,
        }
        for name, array in arrays.items():
            fields[name] = 0 if array is None else array.data.ptr
        fields["operation"] = OPERATIONS.index(operation)
        fields["progress"] = self._progress if operation in _PLANNING else 0
        fields["num_tokens"] = num_tokens
        fields["id_bytes"] = 0 if ids is None else ids.dtype.itemsize
        self._pack(stream, self._ctas, self._params)
        parts = [(self._messages.data.ptr, self._message_bytes)]
        if all_rows is not None:
            parts.append((all_rows.data.ptr, self._row_bytes))
        self._transfer(parts, parts, stream, from_own=True)
        self._localize(stream, self._ctas, self._params)

    def send_back(self, out: Any = None, out_dweight: Any = None) -> None:
        """End a call: return partial sums, and add those of this rank's tokens into out [T, H] and
        out_dweight [T, K]."""
        fields, stream = self._params.fields, self._cp.cuda.get_current_stream().ptr
        arrays = {"out": out, "out_dweight": out_dweight}
        sends, receives = [], []
        if out is not None:
            arrays |= {"partials": self.results, "returned": self.rows}
            sends.append((self.results.data.ptr, self._row_bytes))
            receives.append((self.rows.data.ptr, self._row_bytes))
        if out_dweight is not None:
            arrays |= {
                "dweight_partials": self.dweights,
                "returned_dweight": self._returned_dweights,
            }
            nbytes = 4 * self._spec.max_tokens * self._spec.topk
            sends.append((self.dweights.data.ptr, nbytes))
            receives.append((self._returned_dweights.data.ptr, nbytes))
        for name, array in arrays.items():
            fields[name] = 0 if array is None else array.data.ptr
        self._outcome(stream, 1, self._params)
        outcomes = [(self._outcomes.data.ptr, outcome_dtype.itemsize)]
        self._transfer(sends, receives, stream, outcomes=outcomes)
        self._add(stream, self._ctas, self._params)

    def _out_of(self, all_rows: Any, rows: Any) -> Any:
        """The rows, or a copy if they lie in all_rows at another place than their own."""
        begin, address = all_rows.data.ptr, rows.data.ptr
        own = begin + self._world.node_index * self._row_bytes
        if address == own or address + rows.nbytes <= begin or address >= begin + all_rows.nbytes:
            return rows
        return rows.copy()

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

    def _transfer(
        self,
        sends: list[tuple[int, int]],
        receives: list[tuple[int, int]],
        stream: int,
        *,
        from_own: bool = False,
        outcomes: Any = (),
    ) -> None:
        """Transfers with all other ranks of the rail; (address, bytes of one rank) of arrays [N].

        Args:
            from_own: send this rank's own part to all. Otherwise each gets the part of its own.
            outcomes: further arrays, sent `from_own`.
        """
        own = self._world.node_index
        out, back = [], []
        for node in range(self._world.nodes):
            if node == own:
                continue
            part = own if from_own else node
            out += [(node, address + part * nbytes, nbytes) for address, nbytes in sends]
            out += [(node, address + own * nbytes, nbytes) for address, nbytes in outcomes]
            for address, nbytes in (*receives, *outcomes):
                back.append((node, address + node * nbytes, nbytes))
        self._nccl.transfer(out, back, stream)
