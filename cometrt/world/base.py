"""`World`: ranks with shared memory, collectives, waits with deadlines, and a common stop.

Each rank owns one *control block* (flags, headers, failure records, a message) and named *regions*.
Every rank can read and write the control blocks and regions of all ranks. A subclass allocates that
memory (`allocate_host`), orders accesses to it (`fence`) and ends a rank's part (`_leave`).
"""

from __future__ import annotations

import abc
import logging
import os
import secrets
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, SupportsInt, TypeVar

import numpy as np

from cometrt.closing import Closing
from cometrt.specs import check_timeout
from cometrt.world.blas import pin_blas_threads, unpin_blas_threads
from cometrt.world.collectives import allgather
from cometrt.world.control_block import control_block_dtype
from cometrt.world.failure import Failure, WaitTarget, failure_of, recorded
from cometrt.world.link import Link
from cometrt.world.one_call import OneCall
from cometrt.world.regions import Regions
from cometrt.world.reset import reset
from cometrt.world.wait import wait

if TYPE_CHECKING:
    from cometrt.world.device import DeviceMemory

_log = logging.getLogger("cometrt")

Value = TypeVar("Value")


class World(Closing):
    """A group of W ranks, made by ``cometrt.connect`` or ``cometrt.spawn``.

    A rank may call the world and its layers from any thread, but only from one at a time: a call
    during another call is a ValueError. In a child of ``os.fork()`` every call is a ValueError;
    leaving the child does not affect the parent.

    Attributes:
        rank, size: this rank, and W.
        nodes, ranks_per_node: N and G; W = N * G.
        node_index: of this rank's node; rank = node_index * G + place in the node.
        device: "host" or "cuda".
        gpu: this rank's DeviceMemory on "cuda", else None.
        timeout_sec: the longest time that a single wait may last, in seconds.
        link: this rank's share of an emulated link; None: no emulation.
        epoch: number of exchanges begun. Between calls it is equal on all ranks.
        sequence: number of messages exchanged by host collectives. Equal like epoch.
        generation: 1 + the number of resets.
        one_call: held during each call of the world or of a layer.
        regions: the memory that peers access.
    """

    nodes, node_index = 1, 0
    first_rank = 0  # added to rank numbers in messages: of a node's world, its first rank of all

    def __init__(self, rank: int, size: int, device: str, timeout_sec: float) -> None:
        self.rank, self.size, self.device = rank, size, device
        self.timeout_sec = check_timeout(timeout_sec)
        self.epoch = self.sequence = self.num_layers = 0
        self.generation = 1
        self._num_allocations = 0
        self._closed = False
        self._process_id = os.getpid()
        self._stop_lock, self._end_lock = threading.Lock(), threading.Lock()
        self.one_call = OneCall()
        self.regions = Regions(self)
        self.gpu: DeviceMemory | None = None
        self.link: Link | None = None
        dtype = control_block_dtype(size)
        self.control_blocks = [
            memory.view(dtype)[0] for memory in self.allocate_host(dtype.itemsize)
        ]
        self.control_block["generation"][0] = self.generation
        self._abort = self.control_block["abort"]  # a view: each call looks at it
        pin_blas_threads()
        try:
            # Identifies this world in residuals, which may outlive it.
            self.identity = int(self.allgather(secrets.randbits(62), purpose="world")[0])
            if device == "cuda" and self.nodes == 1:
                from cometrt.world.device import DeviceMemory

                self.gpu = DeviceMemory(self)
        except BaseException as error:
            self.abandon(error)
            raise

    @abc.abstractmethod
    def allocate_host(self, nbytes: int) -> list[np.ndarray]:
        """Collective: zeroed bytes of every rank, in rank order.

        `_num_allocations` must be equal on all ranks; it identifies the allocation.
        """

    @abc.abstractmethod
    def fence(self) -> None:
        """Order this thread's earlier accesses to shared memory before its later ones."""

    @abc.abstractmethod
    def _leave(self) -> None:
        """Signal that this rank has closed. Wait for peers if they still access its memory."""

    @abc.abstractmethod
    def _leave_at_once(self) -> None:
        """Leave after an error that peers already know of, without waiting for them."""

    @property
    def shares_gpu(self) -> bool:
        """Whether other ranks of this process use the same GPU."""
        return False

    @property
    def shares_process(self) -> bool:
        """Whether other ranks are threads of this process."""
        return False

    @property
    def ranks_per_node(self) -> int:
        return self.size // self.nodes

    @property
    def node(self) -> World:
        """The world of this node's ranks: of one node, this world itself."""
        return self

    @property
    def control_block(self) -> np.void:
        """This rank's control block."""
        return self.control_blocks[self.rank]

    def allocate(self, nbytes: int) -> list[Any]:
        """Collective: zeroed memory of every rank on the world's device, in rank order.

        Returns:
            byte arrays; on "cuda" addresses, valid on this rank's device.
        """
        return self.gpu.allocate(nbytes) if self.gpu else self.allocate_host(nbytes)

    @abc.abstractmethod
    def share_device_memory(self, pointer: int) -> list[int]:
        """Collective, on "cuda": the addresses of all ranks' allocations on this rank's device."""

    @abc.abstractmethod
    def close_device_memory(self, pointer: int) -> None:
        """Close a peer's allocation that `share_device_memory` returned."""

    def wait(
        self,
        read: Callable[[], SupportsInt],
        target: WaitTarget,
        *,
        even_if_stopped: bool = False,
        mismatch: Callable[[], str] = str,
        gone: Callable[[], str] | None = None,
    ) -> None:
        """Return when ``read() >= target.expected``. Then all writes before the signal are visible.

        Args:
            read: reads the flag.
            even_if_stopped: wait in a stopped world too. Then a failure does not stop the world.
            mismatch: describes the other call that the peer has made; "": it has made none.
            gone: describes why the peer will never signal; "": it still may. None: read the
                peer's control block.

        Raises:
            PeerTimeout: after timeout_sec, or if the peer is gone; this stops the world.
            MismatchError: if the peer made another call; this stops the world.
            Either: if another rank has stopped the world.
        """
        wait(self, read, target, even_if_stopped, mismatch, gone)

    def stop(self, failure: Failure) -> None:
        """Write the failure into all control blocks and end the waits of all ranks.

        Of several failures of this rank in one generation the first one stands.
        """
        if self._is_forked():
            return
        with self._stop_lock:
            if int(self.control_block["failure"][self.rank]["generation"]) == self.generation:
                return
            _log.error("rank %d stops the world: %s", self.rank + self.first_rank, failure.text)
            for control_block in self.control_blocks:
                failure.write(control_block["failure"][self.rank], self.generation)
            self.fence()
            try:
                if self.gpu:  # first: a host that wakes may wait for its GPU, as cudaMalloc does
                    self.gpu.abort(self.generation)
            finally:
                for block in self.control_blocks:
                    block["abort"][0] = max(int(block["abort"][0]), self.generation)

    def check_running(self, prefix: str = "") -> None:
        """Raise the failure that stopped the world, with a prefix; return if the world runs."""
        self.check_open()
        if self.stopped:
            self.fence()
            error = self._failure().error(prefix)
            error.relayed = True
            raise error

    def check_open(self) -> None:
        """Raise a ValueError if the world is closed, or of another process."""
        if self._is_forked():
            raise ValueError(
                "world must be used by the process that made it (this is a child of os.fork())"
            )
        if self._closed:
            raise ValueError("world must be open (it was closed)")

    def _is_forked(self) -> bool:
        return os.getpid() != self._process_id

    @property
    def stopped(self) -> bool:
        """Whether a rank has stopped the world since the last reset, as far as the host knows."""
        return int(self._abort.item()) >= self.generation

    def _failure(self) -> Failure:
        """Why the world stopped."""
        failures, number = self.control_block["failure"], self.rank + self.first_rank
        return recorded(failures, self.generation, number)

    def reset(self) -> None:
        """Collective: make a stopped world usable again. No call may be under way on this rank.

        If the world is running, a peer that waits for this rank in a call gets a PeerTimeout.

        Raises:
            PeerTimeout: if a rank does not call it within timeout_sec; reset may be tried again.
                At once if a rank has closed or left the world.
        """
        self.check_open()
        with self.one_call.hold("world.reset"):
            reset(self)

    def next_epoch(self) -> int:
        """Begin an exchange: increment the epoch, publish it to peers and return it."""
        self.epoch += 1
        self.control_block["epoch"][0] = self.epoch
        return self.epoch

    def barrier(self) -> None:
        """Collective: return when every rank has called it.

        Raises:
            PeerTimeout, MismatchError: as for `allgather`.
        """
        with self.one_call.hold("world.barrier", inner=True):
            self.allgather(None, purpose="barrier")

    def allgather(self, value: Value, *, purpose: str = "allgather") -> list[Value]:
        """Collective: the values of all ranks, in rank order.

        Args:
            value: anything that can be pickled.
            purpose: a name of the collective, which must be equal on all ranks.

        Raises:
            PeerTimeout: if a rank does not call it within timeout_sec.
            MismatchError: if a rank made another call, or passed another purpose.
        """
        self.check_open()
        with self.one_call.hold("world.allgather", inner=True):
            return allgather(self, value, purpose)

    def close(self) -> None:
        """Collective: release the world's memory. Further calls of `close` do nothing.

        Arrays that the caller still holds stay valid.

        Raises:
            PeerTimeout: under MPI, if a rank does not close within timeout_sec, or leaves after
                an error. This rank is closed nevertheless.
        """
        if self._closed or self._is_forked():
            return
        with self.one_call.hold("world.close"):
            if not self._end():
                return
            try:
                if self.gpu:
                    self.gpu.drain()
                    self.control_block["epoch"][0] = self.gpu.read_epochs([self.rank])[0]
                self._leave()
            except BaseException as error:
                self._signal_left(error)
                raise
            finally:
                self.regions.clear()

    def abandon(self, error: BaseException) -> None:
        """Leave because of `error`: end the peers' waits without waiting for them.

        On "cuda" the memory that peers access stays until the process ends, since a peer's kernel
        may still use it.
        """
        if self._end():
            self._signal_left(error)
            self._leave_at_once()

    def _end(self) -> bool:
        """Mark the world closed. `spawn` and the rank may both try; the first one gets True."""
        if self._is_forked():
            return False
        with self._end_lock:
            if self._closed:
                return False
            self._closed = True
        unpin_blas_threads()
        return True

    def _signal_left(self, error: BaseException) -> None:
        try:
            if not self.stopped:  # else peers already have a failure that explains more
                self.stop_for(error)
        finally:
            self.control_block["closing"][0] = -1

    def stop_for(self, error: BaseException, where: str = "", tile: int = -1) -> None:
        """Stop the world because this rank raised `error`; peers raise a PeerTimeout about it.

        Args:
            where: " in ..." or ""; the step that raised it.
            tile: the tile of that step, or -1.
        """
        self.stop(failure_of(self.rank + self.first_rank, error, where, tile, self.epoch))

    def __repr__(self) -> str:
        return f"<{type(self).__name__} rank {self.rank} of {self.size}, {self.device}>"
