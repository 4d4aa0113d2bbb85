"""`NcclRail`: the NCCL communicator of a rank's rail, and the thread that watches it.

NCCL waits without a deadline. So a thread looks at two counters in the host's memory, which kernels
raise before and after each transfer. If a transfer lasts longer than the world's timeout, if
kernels find that ranks of the rail make different calls, if NCCL reports an error, or if the world
stops, it stops the world and aborts the communicator. Then the transfer's kernel ends.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from cometrt.errors import CometError
from cometrt.world.failure import SLOW, Failure, WaitTarget, different_calls

if TYPE_CHECKING:
    from cometrt.world.nodes import NodesWorld

_log = logging.getLogger("cometrt")

_LOOK_SEC = 2e-3
_CLOSE_SEC = 5.0  # the longest time to wait for the thread
_QUEUEING_SEC = 0.5  # the longest time to wait until a transfer is queued
Transfers = list[tuple[int, int, int]]  # (node, address, bytes)


class NcclRail:
    """Of one rank.

    Attributes:
        steps: [4] uint64 in pinned memory, as `steps` of kernels_cu/nodes/rail_params.cuh.
        max_ctas: the most CTAs of a transfer, by NCCL's environment variables when the communicator
            was made; None: they give no bound.
        clusters: whether these CTAs may be clusters then, which need neighbouring SMs.
    """

    def __init__(self, world: NodesWorld) -> None:
        """Collective."""
        import cupy
        from cupy.cuda import nccl

        self._library, self._world = nccl, weakref.ref(world)
        self._device_id = cupy.cuda.Device().id
        self.steps = np.frombuffer(cupy.cuda.alloc_pinned_memory(32), np.uint64, 4)
        self.max_ctas = max_ctas(os.environ)
        self.clusters = os.environ.get("NCCL_CGA_CLUSTER_SIZE", "") not in ("0", "1")
        self._comm: Any = None
        self._lock = threading.Lock()  # the communicator does not end while it is held
        self._queueing = threading.Lock()  # held while a transfer is queued
        self._seen, self._since = (0, 0), time.monotonic()
        self._closing = threading.Event()
        self.renew()
        self._thread = threading.Thread(
            target=_watch,
            args=(weakref.ref(self), self._closing, self._device_id),
            name=f"cometrt-rank{world.rank}-nccl",
            daemon=True,
        )
        self._thread.start()
        weakref.finalize(self, _end_thread, self._thread, self._closing)

    def renew(self) -> None:
        """Collective, while no call is under way: make a new communicator."""
        world = self._running_world()
        self._abort()
        unique_id = self._library.get_unique_id() if world.node_index == 0 else None
        unique_id = world.allgather(unique_id, purpose="NCCL")[world.rail[0]]
        self.steps[:] = 0
        made: list[Any] = []
        self._run_with_deadline(
            world, lambda: made.append(self._connect(world.nodes, unique_id, world.node_index))
        )
        self._comm = made[0]
        world.barrier()

    def _connect(self, nodes: int, unique_id: Any, node: int) -> Any:
        """A communicator that has sent something to every rank: to connect may wait for the device,
        which must not happen once kernels wait for peers."""
        import cupy

        comm = self._library.NcclCommunicator(nodes, unique_id, node)
        stream = cupy.cuda.Stream(non_blocking=True)
        memory = cupy.cuda.alloc(64 * (nodes + 1))
        others = [other for other in range(nodes) if other != node]
        sends = [(other, memory.ptr, 64) for other in others]
        receives = [(other, memory.ptr + 64 * (other + 1), 64) for other in others]
        self._transfer(comm, sends, receives, stream.ptr)
        stream.synchronize()
        return comm

    def _run_with_deadline(self, world: NodesWorld, work: Callable[[], None]) -> None:
        import cupy

        errors: list[BaseException] = []

        def run() -> None:
            try:
                cupy.cuda.Device(self._device_id).use()
                work()
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=run, name="cometrt-nccl-connect", daemon=True)
        thread.start()
        peer = next(rank for rank in world.rail if rank != world.rank)
        world.wait(lambda: not thread.is_alive(), WaitTarget("rendezvous", peer, 1))
        if errors:
            raise CometError(f"NCCL cannot connect the nodes: {errors[0]}") from errors[0]

    def transfer(self, sends: Transfers, receives: Transfers, stream: int) -> None:
        """Queue transfers to and from ranks of the rail on a raw stream, all at once."""
        with self._queueing:
            comm = self._comm  # without `_lock`: it may have to be aborted meanwhile
            if comm is None:
                self._running_world().check_running()
                raise CometError("NCCL between the nodes has been given up")
            try:
                self._transfer(comm, sends, receives, stream)
            except Exception:
                self._running_world().check_running()  # the communicator was aborted meanwhile
                raise

    def _transfer(self, comm: Any, sends: Transfers, receives: Transfers, stream: int) -> None:
        library = self._library
        library.groupStart()
        try:
            for node, address, nbytes in sends:
                comm.send(address, nbytes, library.NCCL_INT8, node, stream)
            for node, address, nbytes in receives:
                comm.recv(address, nbytes, library.NCCL_INT8, node, stream)
        finally:
            library.groupEnd()

    def look(self) -> None:
        """What the thread does again and again."""
        world = self._running_world()
        world.update()
        steps, now = (int(self.steps[0]), int(self.steps[1])), time.monotonic()
        if world.is_stopped:
            self._seen, self._since = steps, now
            self._abort()
            return
        if epoch := int(self.steps[3]):
            world.stop(different_calls(epoch, world.rank, world.node_index))
            return
        if steps != self._seen or steps[0] == steps[1]:
            self._seen, self._since = steps, now
        elif now > self._since + world.timeout_sec:
            self._stop(world, f"waited {world.timeout_sec:g} s", SLOW)
            return
        try:
            with self._lock:
                if self._comm is not None:
                    self._comm.check_async_error()
        except Exception as error:  # CuPy knows no text for some of them
            self._stop(world, "cannot wait", f"NCCL failed: {error!r}")

    def _stop(self, world: NodesWorld, what: str, why: str) -> None:
        flag = "rail_partials" if int(self.steps[0]) % 2 else "rail_tokens"
        others = [rank for rank in world.rail if rank != world.rank]
        text = (
            f"rank {world.rank} {what} for {flag} from rank "
            f"{' or rank '.join(map(str, others))}; {why}"
        )
        peer = others[0] if len(others) == 1 else -1
        world.stop(Failure("timeout", world.rank, text, flag=flag, peer=peer))

    def _running_world(self) -> NodesWorld:
        world = self._world()
        assert world is not None
        return world

    def _abort(self) -> None:
        """NCCL may hang if a communicator is aborted in the middle of queueing. But to queue may
        itself wait for a peer: so this waits for it no longer than a while."""
        if self._comm is None:
            return
        queued = self._queueing.acquire(timeout=_QUEUEING_SEC)
        try:
            self._abort_now()
        finally:
            if queued:
                self._queueing.release()

    def _abort_now(self) -> None:
        world = self._world()
        with self._lock:
            comm, self._comm = self._comm, None
            if comm is None:
                return
            if world is not None and world.is_stopped and world.node.gpu is not None:
                # What follows the transfer on the stream knows then that it was cut short.
                world.node.gpu.complete_abort()
            comm.abort()

    def close(self) -> None:
        """End the thread and the communicator. No transfer may be under way, unless the world has
        stopped."""
        _end_thread(self._thread, self._closing)
        self._abort()


def max_ctas(environment: Mapping[str, str]) -> int | None:
    """The most CTAs that NCCL uses for transfers, as its variables say; None: they do not. It makes
    channels by powers of two, one CTA each."""
    names = ("NCCL_MAX_CTAS", "NCCL_MAX_NCHANNELS")
    values = [int(text) for name in names if (text := environment.get(name, "")).isdecimal()]
    bounds = [value for value in values if value > 0]
    return 1 << (min(bounds) - 1).bit_length() if bounds else None


def _watch(of: weakref.ref[NcclRail], closing: threading.Event, device_id: int) -> None:
    import cupy

    cupy.cuda.Device(device_id).use()
    while not closing.wait(_LOOK_SEC):
        rail = of()
        if rail is None or rail._world() is None:
            return
        try:
            rail.look()
        except Exception:
            _log.exception("the thread that watches NCCL has ended")
            return
        del rail


def _end_thread(thread: threading.Thread, closing: threading.Event) -> None:
    closing.set()
    if thread is not threading.current_thread():
        thread.join(_CLOSE_SEC)
