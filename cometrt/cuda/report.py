"""What kernels leave behind for the host: how a call ended, and what stopped the world."""

from __future__ import annotations

from typing import Any

import numpy as np

from cometrt.errors import CometError
from cometrt.kernels.params import call_state_dtype
from cometrt.world import World
from cometrt.world.failure import FLAGS, KINDS, Failure, Wanted
from cometrt.world.layout import control_dtype

OPERATIONS = ("", "forward", "backward")  # numbers on the wire


class Report:
    """Pinned copies of what a call's kernels left on the device.

    Attributes:
        expert_offsets: the plan's, [E_l + 1], where it was copied.
    """

    def __init__(self, world: World, local_experts: int) -> None:
        import cupy as cp

        def pinned(dtype: Any, count: int) -> np.ndarray:
            nbytes = np.dtype(dtype).itemsize * count
            memory = cp.cuda.alloc_pinned_memory(nbytes)
            self._pinned.append(memory)
            return np.frombuffer(memory, dtype, count)

        self._world, self._cp, self._pinned = world, cp, list[Any]()
        self._control = pinned(control_dtype, 1)
        self._state = pinned(call_state_dtype, 1)
        self.expert_offsets = pinned(np.int32, local_experts + 1)
        self.event = cp.cuda.Event(disable_timing=True)

    def copy(self, state: Any, expert_offsets: Any = None) -> None:
        """Copy in stream order, then record `event`."""
        assert self._world.gpu is not None
        sources = [
            (self._control, self._world.gpu.control[self._world.rank]),
            (self._state, int(state.data.ptr)),
        ]
        if expert_offsets is not None:
            sources.append((self.expert_offsets, int(expert_offsets.data.ptr)))
        stream, runtime = self._cp.cuda.get_current_stream(), self._cp.cuda.runtime
        for target, pointer in sources:
            runtime.memcpyAsync(
                target.ctypes.data,
                pointer,
                target.nbytes,
                runtime.memcpyDeviceToHost,
                stream.ptr,
            )
        self.event.record(stream)

    @property
    def ok(self) -> bool:
        """Whether all ranks called the same and the routing is right; valid after `event`."""
        return bool(self._state["ok"][0])

    def stop_found(self) -> CometError | None:
        """What stopped the world on the device, told to the hosts too; None if nothing did."""
        world, control = self._world, self._control[0]
        if int(control["abort"]) < world.generation:
            return None
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
