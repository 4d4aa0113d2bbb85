"""`LateRail`: the rail of a layer with late parts (`TileConfig.rail_parts`).

The one call of the node's layer begins when the tables of all tokens are there, if it has any.
Rows of other nodes arrive part by part while it runs: `rail_ready` tells the node's ranks, whose
dispatch warps wait for it. As soon as the sums of a part are complete, `rail_wait` lets it go back.
All but the call is on the stream of transfers.
"""

from __future__ import annotations

from typing import Any

from cometrt.nodes.cuda_rail import PARTIALS, TOKENS, CudaRail
from cometrt.nodes.slices import RailSlice


class LateRail(CudaRail):
    """As `CudaRail`."""

    _own: tuple[Any, Any] = None, None  # where this rank's rows go, and where they are

    def _place(self, rows: Any, all_rows: Any) -> tuple[Any, Any]:
        self._own = self.own_rows(all_rows), rows
        return self._own[0][: len(rows)], None

    def _arrive(self, of_rows: tuple[int, int] | None) -> None:
        side, parts = self._fork(), self._slices.late_parts if of_rows else 0
        self._transfer(self._transfers.of_messages(self._messages.data.ptr), side)
        if of_rows is not None:
            of_rows = self._copy_own(), of_rows[1]
        of = {"own": 0 if self._wanted else 1, "others": 1}
        self._run(self._localize, side, ends=1, begins=TOKENS if parts else 0, **of)
        self._arrived = [self._record(side)]
        for part in range(parts):
            assert of_rows is not None
            self._transfer(self._transfers.of_tokens(part, *of_rows), side)
            begins = TOKENS if part < parts - 1 else 0
            self._run(self._ready, side, ends=1, begins=begins, part=part)

    def begin_slice(self, of: RailSlice) -> None:
        has_tables = int(self._params.fields["id_bytes"][0])
        if has_tables:  # else the call waits for other nodes only where it needs their rows
            super().begin_slice(of)

    def _copy_own(self) -> int:
        """Copy this rank's rows to where peers pull them, while tables cross. Returns the address
        of max_tokens rows to send."""
        own, rows = self._own
        in_place, (begin, end) = own.data.ptr == rows.data.ptr, self._heap()
        if not in_place and len(rows):
            stream = self._cp.cuda.get_current_stream()
            own.data.copy_from_device_async(rows.data, rows.nbytes, stream)
        outside = rows.data.ptr >= end or rows.data.ptr + rows.nbytes <= begin
        if outside and len(rows) == self._spec.max_tokens:  # the call does not overwrite them
            return int(rows.data.ptr)
        self._fork()
        return int(own.data.ptr)

    def end_slice(self, index: int, of: RailSlice, *, rows: bool, dweights: bool) -> None:
        self._params.fields["slice"] = index
        self._run(self._outcome)
        if not rows:
            return
        assert self._side is not None
        side, results = int(self._side.ptr), self._results(rows, dweights)
        for part in reversed(range(self._slices.late_parts)):  # as they are complete
            ends = 1 if part < self._slices.late_parts - 1 else 0
            self._run(self._wait, side, ends=ends, begins=PARTIALS, part=part)
            self._transfer(self._transfers.of_results(part, results), side)
        self._run(self._step, side, ends=1)

    def end(self, out: Any = None, out_dweight: Any = None, epochs: Any = ()) -> None:
        """As `CudaRail.end`. Sums are made before it is known whether all nodes have succeeded: in
        a backward as soon as dx is complete, while weight gradients are computed."""
        assert self._side is not None
        self._set_results(out, out_dweight, epochs)
        side = int(self._side.ptr)
        returned = self._record(side)
        if out_dweight is not None:
            self._run(self._wait, side, part=self._slices.late_parts)
            self._run(self._add, side, own=1)
        self._exchange_outcomes()
        if out is not None and out_dweight is None:
            self._cp.cuda.get_current_stream().wait_event(returned)
            self._run(self._add, own=1)
        self.join()
        self._run(self._add, ends=1, others=1)
