"""A world: ranks that meet, share memory, wait for each other with deadlines, and stop together.

Each rank owns one *control block* (flags, headers, failure records, a mailbox) and any number of named
*regions*; every rank can read and write every control block and region. A subclass only says where
that memory comes from (`_allocate`), how to order accesses to it (`fence`) and how a rank leaves.
"""

from __future__ import annotations

import abc
import functools
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from cometrt.specs import check_timeout
from cometrt.world.blas import pin_blas_threads, unpin_blas_threads
from cometrt.world.collectives import allgather
from cometrt.world.control_block import control_block_dtype
from cometrt.world.failure import KINDS, Failure, WaitTarget, failure_of
from cometrt.world.link import Link
from cometrt.world.one_call import OneCall
from cometrt.world.regions import Regions
from cometrt.world.reset import reset
from cometrt.world.whereabouts import elsewhere

if TYPE_CHECKING:
    from cometrt.world.device import DeviceMemory

_log = logging.getLogger("cometrt")

_FIRST_PAUSE_SEC, _LONGEST_PAUSE_SEC = 50e-6, 1e-3


class World(abc.ABC):
    """W ranks. Made by ``cometrt.connect`` or ``cometrt.spawn``.

    One thread of a rank at a time calls it and its layers, whichever thread: a call that comes
    during another one is a ValueError. It belongs to the process that made it: in a child of
    ``os.fork()`` every use is a ValueError, and leaving it there changes nothing for the parent.

    Attributes:
        rank, size: this rank, and W.
        device: "host" or "cuda".
        gpu: this rank's device memory on "cuda", else None.
        timeout_sec: longest that any single wait may last.
        link: this rank's share of a modelled link; None where rows cross as fast as they can.
        epoch: exchanges begun so far; equal on all ranks between calls.
        round: meetings so far, likewise.
        generation: the time between two resets that this rank is in, from 1.
        one_call: held during each call of the world or of a layer.
        regions: the memory that peers reach.
    """

    def __init__(self, rank: int, size: int, device: str, timeout_sec: float) -> None:
        self.rank, self.size, self.device = rank, size, device
        self.timeout_sec = check_timeout(timeout_sec)
        self.epoch = 0
        self.sequence = 0
        self.num_layers = 0
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
        self.control_blocks = [memory.view(dtype)[0] for memory in self._allocate(dtype.itemsize)]
        self.control_block["generation"][0] = self.generation
        pin_blas_threads()
        try:
            # Tells this world from others, in what outlives it.
            self.identity = int(self.allgather(secrets.randbits(62), purpose="world")[0])
            if device == "cuda":
                from cometrt.world.device import DeviceMemory

                self.gpu = DeviceMemory(self)
        except BaseException as error:
            self.abandon(error)
            raise

    # ---- what a subclass brings -------------------------------------------------------------

    @abc.abstractmethod
    def _allocate(self, nbytes: int) -> list[np.ndarray]:
        """Collective: memory of every rank, as bytes, in rank order, zeroed before any rank has
        it. `_num_allocations` is equal on all ranks."""

    @abc.abstractmethod
    def fence(self) -> None:
        """Order this thread's accesses to shared memory before it against those after it."""

    @abc.abstractmethod
    def _leave(self) -> None:
        """Say that this rank has closed, and wait for the others where the memory wants it."""

    @abc.abstractmethod
    def _leave_at_once(self) -> None:
        """The same after an error, which peers know already: wait for nobody."""

    # ---- memory -----------------------------------------------------------------------------

    @property
    def shares_gpu(self) -> bool:
        """Whether other ranks of this process work on the same GPU."""
        return False

    @property
    def shares_process(self) -> bool:
        """Whether other ranks are threads of this process."""
        return False

    @property
    def control_block(self) -> Any:
        return self.control_blocks[self.rank]

    def allocate(self, nbytes: int) -> list[Any]:
        """Collective: zeroed memory of every rank on the world's device, in rank order: bytes, or
        on "cuda" addresses on this rank's device. `_num_allocations` is equal on all ranks."""
        return self.gpu.allocate(nbytes) if self.gpu else self._allocate(nbytes)

    @abc.abstractmethod
    def share_device_memory(self, pointer: int) -> list[int]:
        """Collective, on "cuda": every rank's allocation as this rank's device reaches it."""

    @abc.abstractmethod
    def close_device_memory(self, pointer: int) -> None:
        """Let go of a peer's allocation, of `share_device_memory`."""

    # ---- waiting and stopping ---------------------------------------------------------------

    def wait(
        self,
        read: Callable[[], Any],
        wanted: WaitTarget,
        *,
        even_if_stopped: bool = False,
        misplaced: Callable[[], str] = str,
        absent: Callable[[], str] | None = None,
    ) -> None:
        """Return when ``read() >= wanted.expected``; what its setter wrote before is visible.

        Args:
            even_if_stopped: whether to wait in a stopped world too; nothing of it stops the world.
            misplaced: how the peer has called something else, or "".
            absent: how the peer has gone and will not come, or ""; None: as its control block says.

        Raises:
            PeerTimeout: after timeout_sec, or when the peer is absent; the world is stopped.
            MismatchError: when the peer is misplaced, likewise.
            Either: because another rank stopped the world.
        """
        absent = absent or functools.partial(elsewhere, self, wanted.peer)
        deadline = time.monotonic() + self.timeout_sec
        pause = _FIRST_PAUSE_SEC
        while (found := int(read())) < wanted.expected:
            failure = None
            if text := misplaced():
                failure = Failure("mismatch", self.rank, text)
            elif text := absent():
                failure = wanted.lost(self.rank, found, text)
            elif time.monotonic() > deadline:
                failure = wanted.expired(self.rank, found, self.timeout_sec)
            if failure or (not even_if_stopped and self.stopped):
                self.fence()
                # The peer may have come, and gone on, since `read`: what it did first counts.
                if int(read()) >= wanted.expected:
                    break
                if not even_if_stopped:
                    self.check_running()
            if failure:
                if not even_if_stopped:
                    self.stop(failure.told())
                raise failure.error()
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_SEC)
        self.fence()

    def stop(self, failure: Failure) -> None:
        """Tell every rank why, and end all their waits. The first failure of a rank stands."""
        if self._is_forked():
            return
        with self._stop_lock:
            if int(self.control_block["failure"][self.rank]["generation"]) == self.generation:
                return
            _log.error("rank %d stops the world: %s", self.rank, failure.text)
            for control_block in self.control_blocks:
                failure.write(control_block["failure"][self.rank], self.generation)
            self.fence()
            for control_block in self.control_blocks:
                control_block["abort"][0] = max(int(control_block["abort"][0]), self.generation)
            if self.gpu:
                self.gpu.abort(self.generation)

    def check_running(self, prefix: str = "") -> None:
        """Raise what stopped the world, if anything did."""
        self._check_open()
        if self.stopped:
            self.fence()
            error = self._failure().error(prefix)
            error.relayed = True
            raise error

    def _check_open(self) -> None:
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
        """Whether a rank has stopped the world since its last reset, as far as this host knows."""
        return int(self.control_block["abort"][0]) >= self.generation

    def _failure(self) -> Failure:
        """The record that explains most: raised, mismatch, timeout; this rank's own first."""
        records = [
            Failure.read(record)
            for record in self.control_block["failure"]
            if int(record["generation"]) >= self.generation
        ] or [Failure("timeout", self.rank, "it has said no reason")]
        return min(records, key=lambda f: (KINDS.index(f.kind), f.waiter != self.rank, f.waiter))

    def reset(self) -> None:
        """Collective: make a stopped world work again. No call may be under way on this rank. In a
        world that runs, peers that wait for this rank in a call get a PeerTimeout at once.

        Raises:
            PeerTimeout: if a rank does not come within timeout_sec, and then it may be tried again;
                at once if one has closed or left the world.
        """
        self._check_open()
        with self.one_call.hold("world.reset"):
            reset(self)

    # ---- meeting ----------------------------------------------------------------------------

    def next_epoch(self) -> int:
        self.epoch += 1
        self.control_block["epoch"][0] = self.epoch
        return self.epoch

    def barrier(self) -> None:
        """Collective: return when every rank has called it.

        Raises:
            PeerTimeout, MismatchError: as `allgather`.
        """
        with self.one_call.hold("world.barrier", inner=True):
            self.allgather(None, purpose="barrier")

    def allgather(self, value: Any, *, purpose: str = "allgather") -> list[Any]:
        """Collective: every rank's (picklable) value, in rank order.

        Raises:
            PeerTimeout: if a rank does not come within timeout_sec.
            MismatchError: if a rank came for another purpose.
        """
        self._check_open()
        with self.one_call.hold("world.allgather", inner=True):
            return allgather(self, value, purpose)

    # ---- the end ----------------------------------------------------------------------------

    def close(self) -> None:
        """Collective, may be repeated: give the memory back. A view of it keeps what it shows.

        Raises:
            PeerTimeout: under MPI, if a rank does not close within timeout_sec, or fails; this rank
                has closed all the same.
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
                self._tell_left(error)
                raise
            finally:
                self.regions.clear()

    def __enter__(self) -> World:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
        else:
            self.abandon(error)

    def abandon(self, error: BaseException) -> None:
        """Leave because of `error`: end the peers' waits, and wait for nobody.

        On "cuda" memory that peers reach stays until the process ends: one may still be using it.
        """
        if self._end():
            self._tell_left(error)
            self._leave_at_once()

    def _end(self) -> bool:
        """Nothing begins on this rank any more. Whether it was open until now, since `spawn` may
        abandon a world while its rank leaves it."""
        if self._is_forked():
            return False
        with self._end_lock:
            if self._closed:
                return False
            self._closed = True
        unpin_blas_threads()
        return True

    def _tell_left(self, error: BaseException) -> None:
        try:
            if not self.stopped:  # else the others know already, and from the source
                self.stop_for(error)
        finally:
            self.control_block["closing"][0] = -1

    def stop_for(self, error: BaseException, where: str = "", tile: int = -1) -> None:
        """Stop the world because this rank raised `error`; peers get it as PeerTimeout."""
        self.stop(failure_of(self.rank, error, where, tile, self.epoch))

    def __repr__(self) -> str:
        return f"<{type(self).__name__} rank {self.rank} of {self.size}, {self.device}>"
