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
from cometrt.bench.workloads import cuda_function, device_normal
from cometrt.cuda.engine import GroupedGemm, order_tiles, raster_group_of
from cometrt.world.partitions import num_sms

_NONE = -(2**31)  # kNone of nccl.cu


class Experts:
    """A rank's two grouped GEMMs, planned as a layer plans them, with rows of its own.

    Args:
        layer: whose planner is used.
        ids, weights: [W, T, K] of all ranks.
        expert_weights: w_up and w_down of this rank.

    Attributes:
        plan: on the device.
        x_rows, o: [capacity, H], input and output; x_rows begins with random values.
    """

    def __init__(
        self,
        layer: cometrt.MoELayer,
        ids: np.ndarray,
        weights: np.ndarray,
        expert_weights: tuple[Any, Any],
    ) -> None:
        shape, geometry = layer.shape, layer.geometry
        size, tokens, _ = ids.shape
        routing = (ids, weights, np.full(size, tokens, np.int32))
        executor: Any = layer.executor
        self.plan = executor.queue.planner.plan(*map(cp.asarray, routing))
        hidden, inner, up = layer.spec.hidden, geometry.local_intermediate, geometry.up_columns
        self._w_up, self._w_down = expert_weights
        self._up = GroupedGemm(layer.spec.activation, write_z=True)
        self._down = GroupedGemm()
        self._up_order = order_tiles(
            self.plan, self._up.num_n_tiles(up), raster_group=raster_group_of(hidden)
        )
        self._down_order = order_tiles(
            self.plan,
            self._down.num_n_tiles(hidden),
            raster_group=raster_group_of(inner),
            backwards=True,
        )
        self.x_rows = device_normal((shape.capacity, hidden))
        dtype = self.x_rows.dtype
        self._z, self._a, self.o = (
            cp.zeros((shape.capacity, columns), dtype) for columns in (up, inner, hidden)
        )

    def __call__(self) -> None:
        self._up(self.x_rows, self._w_up, self._a, self._up_order, z=self._z)
        self._down(self._a, self._w_down, self.o, self._down_order)


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
        experts()
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
