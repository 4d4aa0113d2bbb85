"""What kernels leave behind for the host: how a call ended, and what stopped the world."""

from __future__ import annotations

from typing import Any

import numpy as np

from cometrt.errors import CometError
from cometrt.kernels.params import call_report_dtype, call_state_dtype
from cometrt.plan import PlanShape
from cometrt.plan.reference import too_many_rows
from cometrt.plan.routing import wrong_pair
from cometrt.world import World
from cometrt.world.failure import FLAGS, KINDS, Failure, Wanted
from cometrt.world.layout import control_dtype

OPERATIONS = ("", "forward", "backward")  # numbers on the wire
NO_WRONG_PAIR = 2**64 - 1  # kNoWrongPair of agree.cuh


class Report:
    """What the host reads of a layer's calls.

    Attributes:
        expert_offsets: the plan's, [E_l + 1], where it was copied.
        address: of the CallReport, in memory of the host that kernels write to.
        ended: event at the end of the layer's last call.
    """

    def __init__(self, world: World, shape: PlanShape) -> None:
        import cupy as cp

        geometry = shape.geometry
        self._world, self._shape, self._cp = world, shape, cp
        self._pinned: list[Any] = []
        # One more id than there are: kernels write them behind the record.
        room = call_report_dtype.itemsize + 4 * geometry.spec.topk
        memory = self._new(np.dtype(np.uint8), room)
        self._call = memory[: call_report_dtype.itemsize].view(call_report_dtype)
        first = call_report_dtype.fields["wrong_ids"][1]  # type: ignore[index]
        self._ids = memory[first : first + 4 * geometry.spec.topk].view(np.int32)
        self.address = int(memory.ctypes.data)
        self._epoch = self._call["epoch"]
        self._control = self._new(control_dtype, 1)
        self._state = self._new(call_state_dtype, 1)
        self.expert_offsets = self._new(np.dtype(np.int32), geometry.local_experts + 1)
        self.ended = cp.cuda.Event(disable_timing=True)

    def _new(self, dtype: np.dtype, count: int) -> np.ndarray:
        nbytes = dtype.itemsize * count
        memory = self._cp.cuda.alloc_pinned_memory(nbytes)
        self._pinned.append(memory)
        array = np.frombuffer(memory, np.uint8, nbytes)
        array[:] = 0
        return array.view(dtype)

    def error(self) -> CometError | None:
        """What went wrong first since this was last asked, as far as the device has come."""
        if not self._epoch[0]:
            return None
        found = self._call[0].copy()
        ids = self._ids.copy()
        self._epoch[0] = 0
        if found["stopped"]:
            return self._stop_found(int(found["epoch"]))
        spec, pair = self._shape.geometry.spec, int(found["wrong_pair"])
        if pair != NO_WRONG_PAIR:
            token, k = divmod(pair, spec.topk)
            rank, token = divmod(token, spec.max_tokens)
            return wrong_pair(rank, token, k, ids, float(found["wrong_weight"]), spec)
        packed = int(found["largest_need"])
        return too_many_rows(0xFFFF - (packed & 0xFFFF), packed >> 16, self._shape)

    def read_offsets(self, state: Any, expert_offsets: Any) -> bool:
        """Wait for what is queued; `expert_offsets` is the device's then, if this is True: the
        call goes on."""
        self._read(self._state, int(state.data.ptr))
        self._read(self.expert_offsets, int(expert_offsets.data.ptr))
        self._cp.cuda.get_current_stream().synchronize()
        return bool(self._state["ok"][0])

    def _read(self, target: np.ndarray, pointer: int) -> None:
        runtime, stream = self._cp.cuda.runtime, self._cp.cuda.get_current_stream()
        kind = runtime.memcpyDeviceToHost
        runtime.memcpyAsync(target.ctypes.data, pointer, target.nbytes, kind, stream.ptr)

    def _stop_found(self, epoch: int) -> CometError | None:
        """What stopped the world on the device in that epoch, told to the hosts too."""
        world = self._world
        assert world.gpu is not None
        self._read(self._control, world.gpu.control[world.rank])
        self._cp.cuda.get_current_stream().synchronize()
        control = self._control[0]
        if int(control["abort"]) < world.generation:  # it has been reset since
            if epoch <= world.epoch:
                return None
            return CometError(
                f"a graph captured before world.reset() was replayed (epoch {epoch}): its calls "
                f"belong to a world that has stopped; capture it again"
            )
        records = [r for r in control["failure"] if int(r["generation"]) >= world.generation]
        if not records:  # a host stopped it
            try:
                world.check_running()
            except CometError as error:
                return error
            return None
        record = min(records, key=lambda r: (int(r["kind"]), int(r["waiter"]) != world.rank))
        epoch = int(record["epoch"])
        if KINDS[int(record["kind"])] == "mismatch":
            headers = control["header"][epoch & 1][: world.size]
            text = f"ranks called different things in epoch {epoch}: " + ", ".join(
                f"rank {rank}: {_called(header)}" for rank, header in enumerate(headers)
            )
            failure = Failure("mismatch", int(record["waiter"]), text, epoch=epoch)
        else:
            wanted = Wanted(
                FLAGS[int(record["flag"])],
                int(record["peer"]),
                int(record["expected"]),
                epoch,
                int(record["tile"]),
                int(record["chunk"]),
            )
            failure = wanted.failure(int(record["waiter"]), int(record["found"]), world.timeout_sec)
        world.stop(failure)
        return failure.error()


def _called(header: Any) -> str:
    text = f"{OPERATIONS[int(header['operation'])]} of layer {int(header['layer'])}"
    if header["forward_epoch"]:
        text += f" (of the forward of epoch {int(header['forward_epoch'])})"
    return text
