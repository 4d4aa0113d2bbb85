"""`HostRail`: arrays between the ranks of a rail, by MPI calls that do not block."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from cometrt.errors import MismatchError
from cometrt.nodes.slices import RailSlices
from cometrt.specs import MoESpec
from cometrt.world.failure import Failure, WaitTarget
from cometrt.world.layout import header_dtype
from cometrt.world.nodes import NodesWorld
from cometrt.world.operations import OPERATIONS, call_text
from cometrt.world.peer_status import in_collective

_CALL = ("operation", "layer", "forward_epoch", "epoch", "spec_hash")  # equal on all ranks
_FIRST_TAG, _NUM_TAGS = 2, 30_000  # a generation has a tag: messages of a failed call stay behind

Pair = tuple[np.ndarray, np.ndarray]


class HostRail:
    """The rail of one layer on one rank. Waits have the world's deadlines and errors."""

    def __init__(self, world: NodesWorld, spec: MoESpec, layer: int) -> None:
        from mpi4py import MPI

        self._mpi, self._world, self._spec, self._layer = MPI, world, spec, layer
        own = world.node_index
        self._first_row = RailSlices.of(spec, world.nodes, own).row_of
        self._others = [(own + d) % world.nodes for d in range(1, world.nodes)]
        self._header = np.zeros((), header_dtype)

    def gather(
        self,
        operation: str,
        num_tokens: int,
        arrays: list[Pair],
        forward_epoch: int = 0,
        slots: np.ndarray | None = None,
        refused: int = 0,
    ) -> list[int]:
        """Begin a call: gather the rows of all ranks of the rail.

        Args:
            num_tokens: of this rank.
            arrays: (own [T, n], of the rail [R, n]): rows of the rank on node i come where
                `RailSlices.row_of` of one slice says. Other rows stay as they are.
            forward_epoch: of a backward's forward, or of a planned forward's plan.
            slots: as in `Residuals`; None: all tokens cross.
            refused: not 0: so many tokens should cross, which are too many, and none does.

        Returns:
            the number of tokens that have come from each rank of the rail, and of this rank all; -n
            where n should have crossed.

        Raises:
            PeerTimeout, MismatchError: as a call within a node.
        """
        world = self._world
        self._header[()] = (
            world.next_epoch(),
            OPERATIONS.index(operation),
            self._layer,
            self._spec.digest(),
            forward_epoch,
            -refused if refused else num_tokens,
        )
        for own, all_rows in arrays:
            target = self._rows(all_rows, world.node_index, num_tokens)
            if own.ctypes.data != target.ctypes.data:
                target[...] = own  # which may lie in all_rows too: it is not read any more
        with _Messages(self, "rail_tokens") as messages:
            for node in self._others:
                header, wanted = self._header.copy(), _wanted(slots, node, num_tokens)
                if not refused:
                    header["num_tokens"] = num_tokens if slots is None else wanted.sum()
                messages.send(node, header)
                for _, all_rows in arrays if not refused else ():
                    own = self._rows(all_rows, world.node_index, num_tokens)
                    messages.send(node, own[wanted])
            headers = messages.headers()
            self._check(headers)
            for node in self._others:
                count = int(headers[node]["num_tokens"])
                for _, all_rows in arrays if count >= 0 else ():
                    messages.receive(node, self._rows(all_rows, node, count))
            messages.complete()
        return [int(headers[node]["num_tokens"]) for node in range(world.nodes)]

    def send_back(
        self,
        num_tokens: list[int],
        results: list[Pair],
        failed: bool,
        slots: np.ndarray | None = None,
    ) -> bool:
        """End a call: return each rank its tokens' partial sums, and add them in node order.

        Args:
            num_tokens: what `gather` has returned.
            results: (partial sums [R, n] of this node, out [T, n]).
            failed: whether the call failed on this node; then nothing is sent.
            slots: as for `gather`.

        Returns:
            whether it succeeded on all nodes. Otherwise `out` is as before.
        """
        world, own = self._world, self._world.node_index
        header = np.array(failed, np.int64)
        received: list[dict[int, np.ndarray]] = [{} for _ in results]
        with _Messages(self, "rail_partials") as messages:
            for node in self._others:
                messages.send(node, header)
                for partials, _ in results if not failed else ():
                    messages.send(node, self._rows(partials, node, num_tokens[node]))
            outcomes = messages.headers(header)
            for node in self._others:
                if not outcomes[node]:
                    for (_, out), rows in zip(results, received, strict=True):
                        rows[node] = np.empty_like(out[_wanted(slots, node, len(out))])
                        messages.receive(node, rows[node])
            messages.complete()
        if any(outcomes.values()):
            return False
        for (partials, out), rows in zip(results, received, strict=True):
            rows[own] = self._rows(partials, own, num_tokens[own])
            total = np.zeros(out.shape, np.float32)
            for node in range(world.nodes):
                where = slice(None) if node == own else _wanted(slots, node, len(out))
                total[where] += rows[node].astype(np.float32)
            out[...] = total.astype(out.dtype)
        return True

    def _rows(self, all_rows: np.ndarray, node: int, num_tokens: int) -> np.ndarray:
        first = self._first_row(node)
        return all_rows[first : first + num_tokens]

    def _check(self, headers: dict[int, np.ndarray]) -> None:
        world = self._world
        calls = {node: tuple(int(headers[node][name]) for name in _CALL) for node in headers}
        if len(set(calls.values())) == 1:
            return
        text = f"ranks made different calls in epoch {world.epoch}: " + ", ".join(
            f"rank {rank}: {call_text(*calls[node][:3])}" for node, rank in enumerate(world.rail)
        )
        world.stop(Failure(kind="mismatch", waiter=world.rank, text=text, epoch=world.epoch))
        raise MismatchError(text)


class _Messages:
    """The messages of one step of a call. Between two ranks they arrive in the order of sending."""

    def __init__(self, rail: HostRail, flag: str) -> None:
        self._rail, self._flag, self._world = rail, flag, rail._world
        self._tag = _FIRST_TAG + self._world.generation % _NUM_TAGS
        # (peer, request, memory) of messages that have not arrived.
        self._sends: list[tuple[int, Any, Any]] = []
        self._receives: list[tuple[int, Any, Any]] = []

    def __enter__(self) -> _Messages:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if error is None:
            return
        for _, request, memory in self._receives:
            request.Cancel()
            self._world.retired_receives.append((request, memory))
        self._world.retired_sends += self._sends

    def send(self, node: int, array: np.ndarray) -> None:
        peer, memory = self._world.rail[node], _bytes(array)
        request = self._world.comm.Isend([memory, self._rail._mpi.BYTE], peer, self._tag)
        self._sends.append((peer, request, memory))

    def receive(self, node: int, array: np.ndarray) -> None:
        peer, memory = self._world.rail[node], _bytes(array)
        request = self._world.comm.Irecv([memory, self._rail._mpi.BYTE], peer, self._tag)
        self._receives.append((peer, request, memory))

    def headers(self, own: np.ndarray | None = None) -> dict[int, np.ndarray]:
        """The header of each rank of the rail, by node, once all have come."""
        own = self._rail._header if own is None else own
        headers = {node: own.copy() for node in range(self._world.nodes)}
        for node in self._rail._others:
            self.receive(node, headers[node])
        self._wait(self._receives)
        return headers

    def complete(self) -> None:
        """Wait until all has come, and until what was sent may be overwritten."""
        self._wait(self._receives)
        self._wait(self._sends)

    def _wait(self, messages: list[tuple[int, Any, Any]]) -> None:
        world = self._world
        while messages:
            peer, request, _ = messages[0]
            target = WaitTarget(self._flag, peer, 1, world.epoch)
            mismatch = functools.partial(in_collective, world, peer)
            world.wait(request.Test, target, mismatch=mismatch)
            del messages[0]


def _wanted(slots: np.ndarray | None, node: int, num_tokens: int) -> Any:
    """Which of this rank's tokens cross to a node: an index."""
    return slice(None) if slots is None else slots[node, :num_tokens] >= 0


def _bytes(array: np.ndarray) -> np.ndarray:
    """The memory of a C-contiguous array."""
    return array.reshape(-1).view(np.uint8)
