"""`Mirror`: copies of the control blocks of ranks on other nodes, kept up to date by MPI.

In a world of several nodes each rank has the control blocks of all ranks in its own memory. It
sends what it changes in its own block to all ranks, and enters what it gets into its copies. Nobody
waits for a message here: `World.wait` looks at the copies, with its deadlines.
"""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np

from cometrt.world.failure import failure_dtype

_OWN = ("generation", "epoch", "reset_request", "closing", "sequence")  # written by the owner
_TAG = 1
_EPOCH_SEC = 0.02  # an epoch alone, which only error messages show, is sent after this time
_state_dtype = np.dtype(
    [(name, np.int64) for name in _OWN]
    + [("total", np.int64), ("part", np.int64), ("failure", failure_dtype)]
)


class Mirror:
    """The control blocks of all ranks, on one rank.

    Args:
        comm: an mpi4py communicator of the ranks, used with one tag.
        blocks: of all ranks, in this rank's memory.
    """

    def __init__(self, comm: Any, blocks: list[Any]) -> None:
        from mpi4py import MPI

        self._mpi, self._comm, self._blocks = MPI, comm, blocks
        self._rank = comm.Get_rank()
        self._sent, self._sent_sec = np.zeros((), _state_dtype), 0.0
        self._requests: list[tuple[Any, np.ndarray]] = []
        self._lock = threading.Lock()

    def update(self) -> None:
        """Send what this rank has changed, and enter what has come. Waits for nothing; does nothing
        while another thread is in it."""
        if self._lock.acquire(blocking=False):
            try:
                self._send()
                self._receive()
            finally:
                self._lock.release()

    def push(self) -> None:
        """Send what this rank has changed."""
        with self._lock:
            self._send()

    @property
    def sent(self) -> bool:
        """Whether the memory of all messages may be used again."""
        with self._lock:
            self._forget_sent()
            return not self._requests

    def _send(self) -> None:
        self._forget_sent()
        state, own = self._state(), self._blocks[self._rank]
        last, now = self._sent, time.monotonic()
        if state == last:
            return
        state["epoch"], epoch = last["epoch"], int(state["epoch"])
        if state == last and now < self._sent_sec + _EPOCH_SEC:
            return
        state["epoch"] = epoch
        message = np.empty(0, np.uint8)
        if state["sequence"] != last["sequence"]:
            message = own["message"][int(state["sequence"]) & 1][: int(state["part"])]
        self._sent, self._sent_sec = state.copy(), now
        payload = np.concatenate([np.frombuffer(state.tobytes(), np.uint8), message])
        for peer in range(len(self._blocks)):
            if peer != self._rank:
                request = self._comm.Isend([payload, self._mpi.BYTE], peer, _TAG)
                self._requests.append((request, payload))

    def _state(self) -> np.ndarray:
        own, state = self._blocks[self._rank], np.zeros((), _state_dtype)
        for name in _OWN:
            state[name] = own[name][0]
        total = int(own["message_bytes"][int(state["sequence"]) & 1])
        state["total"], state["part"] = total, min(total, own["message"].shape[1])
        state["failure"] = own["failure"][self._rank]
        return state

    def _forget_sent(self) -> None:
        self._requests = [pair for pair in self._requests if not pair[0].Test()]

    def _receive(self) -> None:
        status = self._mpi.Status()
        while (found := self._comm.Improbe(self._mpi.ANY_SOURCE, _TAG, status)) is not None:
            payload = np.empty(status.Get_count(self._mpi.BYTE), np.uint8)
            found.Recv([payload, self._mpi.BYTE])
            self._enter(status.Get_source(), payload)

    def _enter(self, source: int, payload: np.ndarray) -> None:
        state = payload[: _state_dtype.itemsize].view(_state_dtype)[0]
        message, block = payload[_state_dtype.itemsize :], self._blocks[source]
        parity = int(state["sequence"]) & 1
        if len(message):
            block["message_bytes"][parity] = state["total"]
            block["message"][parity][: len(message)] = message
        for name in _OWN:
            block[name][0] = state[name]
        own, failure = self._blocks[self._rank], state["failure"]
        if failure["generation"] > own["failure"][source]["generation"]:
            own["failure"][source] = failure
            own["abort"][0] = max(int(own["abort"][0]), int(failure["generation"]))
