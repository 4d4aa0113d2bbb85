"""Errors that kernels report to the host: how calls failed, and what stopped the world."""

from __future__ import annotations

import time
import weakref
from typing import Any

import numpy as np

from cometrt.errors import CometError, PeerTimeout
from cometrt.kernels.constants import LATE_PATIENCE, MAX_TOPK, NUM_REPORTS, PLAN_PATIENCE
from cometrt.kernels.params import exchange_report_dtype
from cometrt.plan import PlanShape
from cometrt.plan.reference import too_many_rows
from cometrt.plan.routing import wrong_pair
from cometrt.world import World
from cometrt.world.failure import FLAGS, KINDS, Failure, WaitTarget, different_calls
from cometrt.world.layout import device_control_block_dtype
from cometrt.world.operations import OPERATIONS, call_text

# ReportKind of protocol/exchange_params.cuh
REPORTS = ("", "routing", "no forward", "stopped", "stale graph")
# Deadlines of waits, in multiples of the world's timeout, but for 1.
_PATIENCE = {
    "plan_step": PLAN_PATIENCE,
    "rail_tokens": LATE_PATIENCE,
    "rail_partials": LATE_PATIENCE + 3,
}
_UNSPECIFIED = "; the weight gradients of this backward are unspecified"


def report_of(world: World) -> Report:
    """The world's, on this rank; made by its first layer."""
    assert world.gpu is not None
    if world.gpu.report is None:
        world.gpu.report = Report(world)
    return world.gpu.report


class Report:
    """The first failed call of a world since the host last looked.

    An error that does not stop the world (wrong routing, too many rows) is found by all ranks, each
    at its own time. Until a rank's host has raised it, later calls of that rank do nothing: so all
    ranks have made the same calls when they go on.

    Attributes:
        address: of the ExchangeReports, in memory of the host that kernels write to.
    """

    def __init__(self, world: World) -> None:
        import cupy as cp

        self._world_of, self._cp = weakref.ref(world), cp
        self._shapes: dict[int, PlanShape] = {}  # by layer
        self._calls = pinned(exchange_report_dtype, NUM_REPORTS)
        self._kinds = self._calls["kind"].data  # a memoryview, quick to look at
        self.address = int(self._calls.ctypes.data)
        self._control = pinned(device_control_block_dtype)

    def add_layer(self, layer: int, shape: PlanShape) -> None:
        """Kernels may report on its calls from now on."""
        self._shapes[layer] = shape

    def clear(self) -> None:
        """Forget it: the world has been reset."""
        self._calls["kind"] = 0

    @property
    def has_found(self) -> bool:
        """Whether the device has found anything wrong so far."""
        return any(self._kinds)

    @property
    def kind(self) -> str:
        """Of REPORTS: what the device has found wrong so far."""
        return REPORTS[next((int(kind) for kind in self._calls["kind"] if kind), 0)]

    def error(self) -> CometError | None:
        """The first error since the last call of this method, as far as the device has come.
        Later calls run again after it."""
        if not self.has_found:
            return None
        for report in self._calls:
            if report["kind"]:
                error = self._error_of(report)
                report["kind"] = 0
                return error
        return None

    def _error_of(self, report: Any) -> CometError | None:
        kind, world = REPORTS[int(report["kind"])], self._world_of()
        operation = OPERATIONS[int(report["operation"])]
        call = f"{operation} of layer {int(report['layer'])}"
        assert world is not None
        assert world.gpu is not None
        if kind == "stopped":
            error = self._stop_found(world)
            if operation == "backward":
                tell_unspecified(error)
            return error
        if kind == "stale graph":
            return CometError(
                f"a graph captured before world.reset() was replayed ({call}): its calls belong to "
                f"a world that has stopped; capture it again"
            )
        world.gpu.release_held_calls()
        if kind == "no forward":
            earlier = "forward" if operation == "backward" else "plan"
            return CometError(
                f"the {call} did nothing: its {earlier} failed, or was queued behind a call that "
                f"did"
            )
        return self._routing_error(report)

    def _routing_error(self, found: Any) -> CometError:
        shape = self._shapes[int(found["layer"])]
        spec = shape.geometry.spec
        if found["wrong_pair"]:
            token, k = divmod(int(~found["wrong_pair"]), spec.topk)
            rank, token = divmod(token, spec.max_tokens)
            ids = found["wrong_ids"][: min(spec.topk, MAX_TOPK)]
            return wrong_pair(rank, token, k, ids, float(found["wrong_weight"]), spec)
        packed = int(found["largest_need"])
        return too_many_rows(0xFFFF - (packed & 0xFFFF), packed >> 16, shape)

    def _stop_found(self, world: World) -> CometError:
        """The error that stopped the world on the device. The hosts' part of it is stopped too."""
        cp = self._cp
        assert world.gpu is not None
        stream = cp.cuda.get_current_stream()
        address, kind = world.gpu.control[world.rank], cp.cuda.runtime.memcpyDeviceToHost
        cp.cuda.runtime.memcpyAsync(
            self._control.ctypes.data, address, self._control.nbytes, kind, stream.ptr
        )
        stream.synchronize()
        control = self._control[0]
        records = [r for r in control["failure"] if int(r["generation"]) >= world.generation]
        if not records:  # a host stopped it, and tells other hosts after their devices
            return _told_by_hosts(world)
        record = min(records, key=lambda r: (int(r["kind"]), int(r["waiter"]) != world.rank))
        epoch = int(record["epoch"])
        if KINDS[int(record["kind"])] == "mismatch":
            headers = control["header"][epoch & 1][: world.size]
            text = f"ranks made different calls in epoch {epoch}: " + ", ".join(
                f"rank {rank}: {_called(header)}" for rank, header in enumerate(headers)
            )
            failure = Failure("mismatch", int(record["waiter"]), text, epoch=epoch)
            if (node := int(record["peer"])) >= 0:  # found on the rail, before the node's call
                failure = different_calls(epoch, failure.waiter, node)
        else:
            wanted = WaitTarget(
                FLAGS[int(record["flag"])],
                int(record["peer"]),
                int(record["expected"]),
                epoch,
                int(record["tile"]),
                int(record["chunk"]),
            )
            timeout_sec = _PATIENCE.get(wanted.flag, 1) * world.timeout_sec
            failure = wanted.expired(int(record["waiter"]), int(record["found"]), timeout_sec)
        failure = failure.numbered_from(world.first_rank)
        world.stop(failure)
        return failure.error()


def _told_by_hosts(world: World) -> CometError:
    """Why a host has stopped the world."""
    deadline = time.monotonic() + world.timeout_sec
    while not world.stopped and time.monotonic() < deadline:
        time.sleep(1e-4)
    try:
        world.check_running()
    except CometError as error:
        return error
    return CometError("kernels were told that the world has stopped, but no rank said why")


def pinned(dtype: np.dtype, count: int = 1) -> np.ndarray:
    """Zeroed pinned memory of the host; kernels reach it by the same address."""
    import cupy as cp

    memory = cp.cuda.alloc_pinned_memory(dtype.itemsize * count)
    array = np.frombuffer(memory, np.uint8, dtype.itemsize * count)
    array[:] = 0
    return array.view(dtype)


def tell_unspecified(error: BaseException | None) -> None:
    """Add to a PeerTimeout of a backward that it may have written some weight gradients."""
    if isinstance(error, PeerTimeout) and not str(error).endswith(_UNSPECIFIED):
        error.args = (str(error) + _UNSPECIFIED,)


def _called(header: Any) -> str:
    fields = ("operation", "layer", "forward_epoch")
    return call_text(*(int(header[field]) for field in fields))
