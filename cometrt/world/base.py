"""A world: ranks that meet, share memory, wait for each other with deadlines, and stop together.

Each rank owns one *board* (flags, headers, failure records, a mailbox) and any number of named
*segments*; every rank can read and write every board and segment. A subclass only says where
that memory comes from (`_allocate`), how to order accesses to it (`fence`) and how to free it.
"""

from __future__ import annotations

import abc
import functools
import logging
import secrets
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from cometrt.errors import MismatchError
from cometrt.specs import check_timeout
from cometrt.world.blas import pin_blas_threads, unpin_blas_threads
from cometrt.world.board import board_dtype, value_of
from cometrt.world.failure import KINDS, Failure, Wanted
from cometrt.world.link import Link
from cometrt.world.meetings import Meetings

if TYPE_CHECKING:
    from cometrt.world.device import DeviceMemory

_log = logging.getLogger("cometrt")

_FIRST_PAUSE_SEC, _LONGEST_PAUSE_SEC = 50e-6, 1e-3


class World(abc.ABC):
    """W ranks. Made by ``cometrt.connect`` or ``cometrt.spawn``.

    Attributes:
        rank, size: this rank, and W.
        device: "host" or "cuda".
        gpu: this rank's device memory on "cuda", else None.
        timeout_sec: longest that any single wait may last.
        link: this rank's share of a modelled link; None where rows cross as fast as they can.
        epoch: exchanges begun so far; equal on all ranks between calls.
    """

    def __init__(self, rank: int, size: int, device: str, timeout_sec: float) -> None:
        self.rank, self.size, self.device = rank, size, device
        self.timeout_sec = check_timeout(timeout_sec)
        self.epoch = 0
        self.num_layers = 0
        self._generation = 1
        self._num_allocations = 0
        self._closed = False
        self._stop_lock = threading.Lock()
        self._meetings = Meetings(self)
        self._segments: dict[str, list[Any]] = {}
        self._segment_bytes: dict[str, int] = {}
        self.gpu: DeviceMemory | None = None
        self.link: Link | None = None
        dtype = board_dtype(size)
        self.boards = [memory.view(dtype)[0] for memory in self._allocate(dtype.itemsize)]
        self.board["generation"][0] = self._generation
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
    def _free(self) -> None:
        """Collective: give all memory back when no rank needs it any more."""

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
    def generation(self) -> int:
        return self._generation

    @property
    def board(self) -> Any:
        return self.boards[self.rank]

    def grow_segment(self, name: str, nbytes: int) -> None:
        """Collective: make the segment at least that large on every rank.

        A grown segment is new, zeroed memory; nothing is carried over.
        """
        mine = (nbytes, self._num_allocations)
        ranks = self.allgather(mine, purpose=f"segment {name}")
        wanted = max(nbytes for nbytes, _ in ranks)
        if wanted <= self._segment_bytes.get(name, 0):
            return
        self._segment_bytes[name] = wanted
        self._num_allocations = 1 + max(count for _, count in ranks)
        try:
            allocate = self.gpu.allocate if self.gpu else self._allocate
            self._segments[name] = allocate(max(wanted, 1))
            if name != "flags":
                self._poison(name)
        except BaseException as error:
            self.stop_for(error, " in allocating shared memory")
            raise

    def _poison(self, name: str) -> None:
        """NaN, or -1, until it is written: what is read too early shows."""
        if self.gpu:
            self.gpu.poison(self._segments[name][self.rank], self._segment_bytes[name])
        else:
            self._segments[name][self.rank][:] = 0xFF
        self.barrier()  # before a peer writes into it

    def segment(self, name: str, rank: int) -> Any:
        """Bytes of one rank's segment, on "cuda" its address on this rank's device; look it up
        at each call, it may have grown."""
        return self._segments[name][rank]

    def segment_bytes(self, name: str) -> int:
        return self._segment_bytes[name]

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
        wanted: Wanted,
        *,
        even_if_stopped: bool = False,
        misplaced: Callable[[], str] = str,
    ) -> None:
        """Return when ``read() >= wanted.expected``; what its setter wrote before is visible.

        `misplaced` says how the peer has gone another way, if it has, or nothing.

        Raises:
            PeerTimeout: after timeout_sec, having stopped the world on all ranks.
            MismatchError: when the peer is misplaced, likewise.
            Either: because another rank stopped the world.
        """
        deadline = time.monotonic() + self.timeout_sec
        pause = _FIRST_PAUSE_SEC
        while (found := int(read())) < wanted.expected:
            if not even_if_stopped:
                self.check_running()
                text = misplaced()
                self.fence()
                # The peer may have come and gone on since `read`: what it did first counts.
                if text and int(read()) < wanted.expected:
                    self.stop(Failure(kind="mismatch", waiter=self.rank, text=text))
                    raise MismatchError(text)
            if time.monotonic() > deadline:
                failure = wanted.failure(self.rank, found, self.timeout_sec)
                if not even_if_stopped:
                    self.stop(failure)
                raise failure.error()
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_SEC)
        self.fence()

    def stop(self, failure: Failure) -> None:
        """Tell every rank why, and end all their waits. The first failure of a rank stands."""
        with self._stop_lock:
            if int(self.board["failure"][self.rank]["generation"]) == self._generation:
                return
            _log.error("rank %d stops the world: %s", self.rank, failure.text)
            for board in self.boards:
                failure.write(board["failure"][self.rank], self._generation)
            self.fence()
            for board in self.boards:
                board["abort"][0] = max(int(board["abort"][0]), self._generation)
            if self.gpu:
                self.gpu.abort(self._generation)

    def check_running(self, prefix: str = "") -> None:
        """Raise what stopped the world, if anything did."""
        if self._closed:
            raise ValueError("world must be open (it was closed)")
        if self.stopped:
            self.fence()
            error = self._failure().error(prefix)
            error.relayed = True
            raise error

    @property
    def stopped(self) -> bool:
        """Whether a rank has stopped the world since its last reset, as far as this host knows."""
        return int(self.board["abort"][0]) >= self._generation

    def _failure(self) -> Failure:
        """The record that explains most: raised, mismatch, timeout; this rank's own first."""
        records = [
            Failure.read(record)
            for record in self.board["failure"]
            if int(record["generation"]) >= self._generation
        ]
        return min(records, key=lambda f: (KINDS.index(f.kind), f.waiter != self.rank, f.waiter))

    def reset(self) -> None:
        """Collective: make a stopped world work again. No call may be under way on this rank.

        Raises:
            PeerTimeout: if a rank does not come within timeout_sec; it may be tried again.
        """
        if self._closed:
            raise ValueError("world must be open (it was closed)")
        board = self.board
        if self.gpu:
            self.epoch = board["epoch"][0] = self.gpu.read_epoch()

        def asked(peer: int) -> bool:
            # A rank whose last reset failed half-way asks for a later generation: follow it.
            requests = [int(other["reset_request"][0]) for other in self.boards]
            board["reset_request"][0] = max(self._generation + 1, *requests)
            return requests[peer] >= int(board["reset_request"][0])

        try:
            for peer in range(self.size):
                wanted = Wanted("reset", peer, 1)
                self.wait(functools.partial(asked, peer), wanted, even_if_stopped=True)
            generation = int(board["reset_request"][0])
            self.epoch = max(int(other["epoch"][0]) for other in self.boards)
            self._meetings.round = max(int(other["round"][0]) for other in self.boards)
            board["epoch"][0], board["round"][0] = self.epoch, self._meetings.round
            self.fence()
            board["generation"][0] = generation
            if self.gpu:
                self.gpu.begin_generation(generation, self.epoch)
            for peer in range(self.size):
                wanted = Wanted("reset", peer, generation)
                reached = value_of(self.boards[peer]["generation"])
                self.wait(reached, wanted, even_if_stopped=True)
        except BaseException:
            board["reset_request"][0] = 0
            raise
        finally:
            self._generation = int(board["generation"][0])

    # ---- meeting ----------------------------------------------------------------------------

    def next_epoch(self) -> int:
        self.epoch += 1
        self.board["epoch"][0] = self.epoch
        return self.epoch

    def barrier(self) -> None:
        """Collective: return when every rank has called it.

        Raises:
            PeerTimeout, MismatchError: as `allgather`.
        """
        self.allgather(None, purpose="barrier")

    def allgather(self, value: Any, *, purpose: str = "allgather") -> list[Any]:
        """Collective: every rank's (picklable) value, in rank order.

        Raises:
            PeerTimeout: if a rank does not come within timeout_sec.
            MismatchError: if a rank came for another purpose.
        """
        return self._meetings.allgather(value, purpose)

    def is_meeting(self, peer: int) -> str:
        """How a peer that this rank waits for in an exchange has gone to a meeting instead."""
        return self._meetings.has_gone_to(peer)

    # ---- the end ----------------------------------------------------------------------------

    def close(self) -> None:
        """Collective, may be repeated: free the shared memory. Views into it end here.

        Raises:
            PeerTimeout: under MPI, if a rank does not close within timeout_sec.
        """
        if self._closed:
            return
        self._closed = True
        unpin_blas_threads()
        if self.gpu:
            self.gpu.drain()
        self._free()
        self._segments.clear()
        self.boards = []

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

        Shared memory stays until the process ends, since a peer may still be using it.
        """
        if not self._closed:
            if not self.stopped:  # else the others know already, and from the source
                self.stop_for(error)
            self.board["closing"][0] = -1
            self._closed = True
            unpin_blas_threads()

    def stop_for(self, error: BaseException, where: str = "", tile: int = -1) -> None:
        """Stop the world because this rank raised `error`; peers get it as PeerTimeout."""
        text = f"rank {self.rank} raised {type(error).__name__}{where}: {error}"
        self.stop(
            Failure(
                kind="raised",
                waiter=self.rank,
                peer=self.rank,
                text=text,
                tile=tile,
                epoch=self.epoch,
            )
        )

    def __repr__(self) -> str:
        return f"<{type(self).__name__} rank {self.rank} of {self.size}, {self.device}>"
