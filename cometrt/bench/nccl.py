"""A layer's forward made of parts: NCCL's all-to-all, our grouped GEMMs, and all-to-all back.

It is the strongest form of that. A token crosses once to each rank that wants it, and its partial
sum crosses back once. All ranks know beforehand who needs what: planning and the exchange of counts
are not in its time, whereas the layers' modes plan in theirs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cupy as cp
import numpy as np

import cometrt
from cometrt.bench.experts import Experts
from cometrt.bench.workloads import cuda_function
from cometrt.world.partitions import num_sms

_NONE = -(2**31)  # kNone of nccl.cu


class Nccl:
    """A communicator of a world's ranks."""

    def __init__(self, world: cometrt.World, library: Any) -> None:
        """Collective."""
        self._library, self._rank, self._size = library, world.rank, world.size
        number = library.get_unique_id() if world.rank == 0 else None
        number = world.allgather(number)[0]
        self.version = library.get_version()
        self._comm = library.NcclCommunicator(world.size, number, world.rank)

    @staticmethod
    def connect(world: cometrt.World) -> Nccl | None:
        """Collective; None where NCCL is not installed, or ranks share a GPU, which it refuses."""
        try:
            from cupy.cuda import nccl

            usable = nccl.available and not world.shares_gpu and world.size > 1
        except ImportError:
            usable = False
        return Nccl(world, nccl) if all(world.allgather(usable)) else None

    def exchange(self, sends: dict[int, Any], receives: dict[int, Any]) -> None:
        """Arrays by peer, on the current stream; empty ones on neither side."""
        library, stream = self._library, cp.cuda.get_current_stream().ptr
        library.groupStart()
        for peer, array in sends.items():
            if array.nbytes:
                self._comm.send(array.data.ptr, array.nbytes, library.NCCL_INT8, peer, stream)
        for peer, array in receives.items():
            if array.nbytes:
                self._comm.recv(array.data.ptr, array.nbytes, library.NCCL_INT8, peer, stream)
        library.groupEnd()


class NcclForward:
    """One rank's forward, with T tokens on every rank.

    Args:
        experts: planned for this routing.
        x: [T, H].
        ids, weights: [W, T, K] of all ranks.

    Attributes:
        y: [T, H], the result.
    """

    def __init__(
        self,
        nccl: Nccl,
        experts: Experts,
        world: cometrt.World,
        x: Any,
        ids: np.ndarray,
        weights: np.ndarray,
    ) -> None:
        """Collective."""
        self._nccl, self._experts, self._x = nccl, experts, x
        self._add = cuda_function(Path(__file__).with_name("nccl.cu"), "add_rows")
        me, (size, tokens, topk), hidden, plan = world.rank, ids.shape, x.shape[1], experts.plan
        pair_row, row_pair, sends, offsets, ends = (
            table.get()
            for table in (
                plan.pair_row, plan.row_pair, plan.send_tokens, plan.send_offsets,
                plan.expert_offsets,
            )
        )  # fmt: skip
        others = [rank for rank in range(size) if rank != me]
        # Tokens that come from each rank; as many partial sums go back.
        coming = {rank: sends[offsets[rank] : offsets[rank + 1]] for rank in others}
        wanted = world.allgather(coming)
        leaving = {rank: wanted[rank][me] - me * tokens for rank in others}

        self._leaving = cp.empty((sum(map(len, leaving.values())), hidden), x.dtype)
        self._coming = cp.empty((sum(map(len, coming.values())), hidden), x.dtype)
        self._to, self._from = _parts(self._leaving, leaving), _parts(self._coming, coming)
        self._leaving_sources = _column(np.concatenate([leaving[rank] for rank in others]))

        source = np.full(size * tokens, _NONE, np.int64)
        came = np.concatenate([coming[rank] for rank in others])
        source[came] = np.arange(len(came))
        source[me * tokens : (me + 1) * tokens] = ~np.arange(tokens)
        pairs = row_pair[: ends[-1]]
        self._row_sources = _column(np.where(pairs >= 0, source[pairs // topk], _NONE))

        rows = np.where(pair_row < 0, _NONE, pair_row)
        pair_weights = weights.reshape(-1, topk)
        self._partials = cp.asarray(rows[came].astype(np.int32)), cp.asarray(pair_weights[came])
        own = slice(me * tokens, (me + 1) * tokens)
        back = np.full((tokens, size - 1), _NONE, np.int64)
        begin = 0
        for column, rank in enumerate(others):
            back[leaving[rank], column] = ~np.arange(begin, begin + len(leaving[rank]))
            begin += len(leaving[rank])
        addends = np.concatenate([rows[own], back], axis=1).astype(np.int32)
        ones = np.ones(back.shape, np.float32)
        self._sums = (
            cp.asarray(addends),
            cp.asarray(np.concatenate([pair_weights[own], ones], axis=1)),
        )
        experts.x_rows.fill(0)  # padding rows
        self.y = cp.full(x.shape, np.nan, x.dtype)

    def __call__(self) -> None:
        experts = self._experts
        self._add_rows(self._leaving, self._x, self._x, self._leaving_sources, None)
        self._nccl.exchange(self._to, self._from)
        self._add_rows(experts.x_rows, self._coming, self._x, self._row_sources, None)
        experts.forward()
        self._add_rows(self._coming, experts.o, experts.o, *self._partials)
        self._nccl.exchange(self._from, self._to)
        self._add_rows(self.y, experts.o, self._leaving, *self._sums)

    def _add_rows(self, out: Any, a: Any, b: Any, sources: Any, weights: Any) -> None:
        rows, addends = sources.shape
        if rows:
            pointers = [array.data.ptr for array in (out, a, b, sources)]
            pointers.append(0 if weights is None else weights.data.ptr)
            numbers = map(np.int32, (rows, addends, out.shape[1]))
            self._add((8 * num_sms(),), (256,), (*map(np.uint64, pointers), *numbers))


def _parts(array: Any, tokens: dict[int, np.ndarray]) -> dict[int, Any]:
    """Cut an array whose rows lie in the order of ranks: one part for each rank."""
    found, begin = {}, 0
    for rank, those in tokens.items():
        found[rank] = array[begin : begin + len(those)]
        begin += len(those)
    return found


def _column(values: np.ndarray) -> Any:
    return cp.asarray(values.astype(np.int32)[:, None])
