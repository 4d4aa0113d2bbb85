"""Events of launches that do not record themselves: of mode "sequential", and of preparation."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from cometrt.cuda.types import Launches
from cometrt.kernels.launch import load_kernels
from cometrt.kernels.params import ParamStruct, exchange_state_dtype
from cometrt.trace import Event

LAUNCHES = {  # by name in CallQueue.kernels: role, name and flag of the event
    "publish": ("compute", "publish", ""),
    "await_sources": ("compute", "wait", "source_ready"),
    "plan": ("compute", "plan", ""),
    "prepare": ("compute", "plan", ""),
    "prepare_planned": ("compute", "plan", ""),
    "prepare_backward": ("compute", "plan", ""),
    "backward_order": ("compute", "plan", ""),
    "agree": ("compute", "wait", "source_ready"),
    "dispatch": ("comm", "pull", ""),
    "up": ("compute", "up", ""),
    "down": ("compute", "down", ""),
    "down_dgrad": ("compute", "down dgrad", ""),
    "up_dgrad": ("compute", "up dgrad", ""),
    "wgrad": ("compute", "wgrad", ""),
    "push": ("comm", "reduce and push", ""),
    "home_reduce": ("comm", "reduce at home", ""),
}
ROOM = 4096  # launches of a recording
_MOVES_ROWS = ("dispatch", "push")
_WORDS = 3  # of a launch's record: begin, end, tokens that it moved between ranks
_OK_OFFSET = exchange_state_dtype.fields["ok"][1]  # type: ignore[index]


class LaunchTrace:
    """Records launches until `end`: a kernel before each and one behind it read the GPU's clock.

    Launches that a stream captures are not recorded: their graph may outlive the recording.

    Args:
        kernels: the layer's launches. Those of LAUNCHES are replaced until `end`.
        num_ranks: W, the number of ranks that exchange rows.
    """

    def __init__(self, kernels: Launches, num_ranks: int) -> None:
        import cupy as cp

        self._kernels, self._num_ranks = kernels, num_ranks
        self._runtime = cp.cuda.runtime
        self._read_clock, self._end_launch = load_kernels(
            "common/clock.cu", "read_clock", "end_launch"
        )
        self._records, self._names = cp.zeros((ROOM, _WORDS), cp.uint64), list[str]()
        self._before = {name: kernels[name] for name in LAUNCHES if name in kernels}
        for name, launch in self._before.items():
            kernels[name] = self._recorded(name, launch)

    def end(self) -> None:
        """Later launches are not recorded."""
        self._kernels |= self._before

    def read(self) -> tuple[list[str], np.ndarray]:
        """The names of all launches, and their records: see `events_of_launches`. The launches must
        have ended."""
        return self._names, self._records.get()

    def _recorded(self, name: str, launch: Callable[..., None]) -> Callable[..., None]:
        def record(stream: int, *arguments: Any) -> None:
            if self._runtime.streamIsCapturing(stream):
                launch(stream, *arguments)
                return
            index = len(self._names)
            self._names.append(name)
            if index >= ROOM:
                launch(stream, *arguments)
                return
            address = self._records.data.ptr + 8 * _WORDS * index
            self._read_clock(stream, 1, np.uint64(address))
            launch(stream, *arguments)
            crossing = self._crossing(arguments[0]) if name in _MOVES_ROWS else (0, 0)
            self._end_launch(stream, 1, np.uint64(address), *map(np.uint64, crossing))

        return record

    def _crossing(self, params: ParamStruct) -> tuple[int, int]:
        """Addresses of ExchangeState.ok, and of the number of tokens that this rank pulls from
        others, which is the number of partial rows that it pushes."""
        fields = params.fields
        sent = int(fields["send_offsets"][0]) + 4 * self._num_ranks
        return int(fields["state"][0]) + _OK_OFFSET, sent


def events_of_launches(
    names: list[str], records: np.ndarray, rank: int, row_bytes: int, offset_ns: int = 0
) -> list[Event]:
    """Events of the launches that `LaunchTrace.read` returns. Warns where some did not fit.

    Args:
        names: of LAUNCHES.
        records: [ROOM, 3] uint64: begin and end in ns, and tokens moved between ranks.
        row_bytes: bytes of a token's row.
        offset_ns: is added to their times.
    """
    if len(names) > len(records):
        warnings.warn(
            f"{len(names) - len(records)} launches of rank {rank} did not fit (there is room for "
            f"{len(records)}): record fewer calls at once",
            stacklevel=2,
        )
    events = []
    for name, (begin_ns, end_ns, tokens) in zip(names, records.tolist(), strict=False):
        if not end_ns:  # the launch raised
            continue
        role, label, flag = LAUNCHES[name]
        begin_ns, end_ns = begin_ns + offset_ns, end_ns + offset_ns
        link_bytes = tokens * row_bytes
        events.append(Event(rank, role, label, begin_ns, end_ns, link_bytes=link_bytes, flag=flag))
    return events
