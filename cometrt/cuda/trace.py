"""Events of a layer's calls on the GPU. The fused kernels record themselves while they run (see
kernels_cu/common/trace.cuh); `cometrt.cuda.launch_trace` records the other launches."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from cometrt.cuda.fused import FusedPath
from cometrt.cuda.launch_trace import LaunchTrace, events_of_launches
from cometrt.cuda.report import pinned
from cometrt.cuda.types import Launches
from cometrt.kernels.constants import TRACE_LANES
from cometrt.kernels.launch import load_kernels
from cometrt.kernels.params import (
    trace_lane_dtype,
    traced_exchange_state_dtype,
)
from cometrt.specs import Geometry
from cometrt.trace import Event, Recording

KINDS = (  # role, name, flag; numbers of EventKind
    ("compute", "up", ""),
    ("compute", "down", ""),
    ("compute", "down dgrad", ""),
    ("compute", "up dgrad", ""),
    ("compute", "wgrad", ""),
    ("comm", "pull", ""),
    ("comm", "reduce and push", ""),
    ("comm", "reduce at home", ""),
    ("compute", "wait", "tile_filled"),
    ("comm", "wait", "tile_done"),
    ("comm", "wait", "partials_ready"),
    ("comm", "wait", "link"),
)
_CLOCK_READS = 20
_AT = traced_exchange_state_dtype.fields["trace"][1]  # type: ignore[index]


@contextlib.contextmanager
def recorded_by(
    recording: Recording,
    fused: Sequence[FusedPath],
    kernels: Launches,
    geometry: Geometry,
    state: Any,
    ended: Any,
) -> Iterator[None]:
    """Within it a layer's calls are recorded; at its end the recording gets their events.

    Kernels are loaded when it is entered. No peer's kernel waits for this rank then: all ranks have
    launched the calls before, and the next call begins with a meeting.

    Args:
        fused: paths whose kernels record themselves.
        kernels: the layer's launches; those that do not record themselves are timed.
        state: the layer's ExchangeState, as bytes on the device.
        ended: event at the end of its last call.
    """
    import cupy as cp

    untraced = [path.use(path.load(trace=True)) for path in fused]
    clock = Clock()
    trace = DeviceTrace(state, max((path.num_ctas for path in fused), default=0))
    launches = LaunchTrace(kernels, geometry.size)
    try:
        yield
    finally:
        for path, before in zip(fused, untraced, strict=True):
            path.use(before)
        launches.end()
        ended.synchronize()
        cp.cuda.get_current_stream().synchronize()  # where graphs were launched
        lanes = trace.end()
        names, records = launches.read()
    # Ranks that share a GPU share its clock, and need no comparison, which is off by microseconds.
    offset_ns = 0 if recording.world.shares_gpu else clock.offset_ns()
    rank, row_bytes = recording.world.rank, 2 * geometry.spec.hidden
    recording.events += events_of(lanes, rank, offset_ns)
    recording.events += events_of_launches(names, records, rank, row_bytes, offset_ns)


class Clock:
    """The GPU's clock beside the host's. The kernel is loaded at once."""

    def __init__(self) -> None:
        self._time_ns = pinned(np.dtype(np.uint64))
        (self._read,) = load_kernels("common/clock.cu", "read_clock")
        self.offset_ns()

    def offset_ns(self) -> int:
        """Nanoseconds to add to the GPU's time for the host's `time.monotonic_ns`.

        An idle GPU reads its clock in the middle between launch and end, to within a few
        microseconds.
        """
        import cupy as cp

        stream, address = cp.cuda.get_current_stream(), np.uint64(self._time_ns.ctypes.data)
        found = []
        for _ in range(_CLOCK_READS):
            begin = time.monotonic_ns()
            self._read(stream.ptr, 1, address)
            stream.synchronize()
            end = time.monotonic_ns()
            found.append((end - begin, (begin + end) // 2 - int(self._time_ns[0])))
        return min(found)[1]  # of the quickest


class DeviceTrace:
    """Memory that recording kernels write to, until `end`.

    Args:
        state: as for `recorded_by`.
        num_ctas: the most that a kernel has; 0: no kernel records itself.
    """

    def __init__(self, state: Any, num_ctas: int) -> None:
        import cupy as cp

        self._pointer = state[_AT : _AT + 8].view(cp.uint64)
        self._before = int(self._pointer.get()[0])
        shape = (num_ctas, TRACE_LANES, trace_lane_dtype.itemsize)
        self._lanes = cp.zeros(shape, cp.uint8)
        self._point_to(self._lanes.data.ptr)

    def end(self) -> np.ndarray:
        """[num_ctas, TRACE_LANES] of trace_lane_dtype. The kernels must have ended."""
        self._point_to(self._before)
        return self._lanes.get().view(trace_lane_dtype)[..., 0]

    def _point_to(self, address: int) -> None:
        """For kernels on every stream, from now on."""
        import cupy as cp

        self._pointer.set(np.array([address], np.uint64))
        cp.cuda.get_current_stream().synchronize()


def events_of(lanes: np.ndarray, rank: int, offset_ns: int = 0) -> list[Event]:
    """Events of the lanes that `DeviceTrace.end` returns. Warns where some did not fit.

    Args:
        offset_ns: is added to their times.
    """
    room = trace_lane_dtype["events"].shape[0]
    dropped = int(np.maximum(lanes["num_events"].astype(np.int64) - room, 0).sum())
    if dropped:
        warnings.warn(
            f"{dropped} events of rank {rank} did not fit (a thread has room for {room}): "
            "record fewer calls at once",
            stacklevel=2,
        )
    events = []
    for (cta, lane), count in np.ndenumerate(lanes["num_events"]):
        for record in lanes["events"][cta, lane, : min(count, room)].tolist():
            begin_ns, end_ns, local_bytes, link_bytes, tile, column, kind = record
            role, name, flag = KINDS[kind]
            begin_ns, end_ns = begin_ns + offset_ns, end_ns + offset_ns
            events.append(
                Event(
                    rank, role, name, begin_ns, end_ns, tile, local_bytes, link_bytes, flag,
                    column, cta, lane,
                )
            )  # fmt: skip
    return events
