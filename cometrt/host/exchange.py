"""`Exchange`: one epoch on one rank: publishing, local counters, waits, and both roles' threads."""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np

from cometrt.errors import CometError, MismatchError, first_original
from cometrt.heap import SymmetricHeap
from cometrt.plan import Plan, PlanShape
from cometrt.plan.routing import RoutingTables
from cometrt.trace import Tracer
from cometrt.world import World
from cometrt.world.control_block import value_of
from cometrt.world.failure import Failure, WaitTarget
from cometrt.world.operations import OPERATIONS, call_text
from cometrt.world.peer_status import in_collective

_CALL = ("operation", "layer", "forward_epoch", "epoch", "spec_hash")  # equal on all ranks

Stage = tuple[str, Callable[[], None]]  # a role, and what it does


class Exchange:
    """The state of one call that its comm role and its compute role share.

    Attributes:
        tile_filled: "x" or "dy" -> [max_tiles] number of rows in place, padding rows included.
            The comm role increments it, the compute role waits for it.
        tile_done: [max_tiles, N-chunks] number of N-tiles that are stored. The compute role
            increments it, the comm role waits for it.
        waited_us: microseconds in which nothing was done until all ranks had begun the call.
        rows_waited_us: microseconds in which compute waited for rows.
    """

    plan: Plan

    def __init__(
        self, world: World, heap: SymmetricHeap, shape: PlanShape, layer: int, tracer: Tracer
    ) -> None:
        self.world, self.heap, self.shape, self.layer = world, heap, shape, layer
        self.tracer = tracer
        spec = shape.geometry.spec
        self.n_chunks = shape.config.n_chunks(spec.hidden)
        self.tile_filled = {name: np.zeros(shape.max_tiles, np.int64) for name in ("x", "dy")}
        self.tile_done = np.zeros((shape.max_tiles, len(self.n_chunks)), np.int64)
        self._current: dict[str, tuple[str, int]] = {}  # role -> (step, tile)
        self.epoch, self.waited_us, self.rows_waited_us = world.next_epoch(), 0.0, 0.0

    # ---- publishing -------------------------------------------------------------------------

    def publish(
        self,
        operation: str,
        payloads: dict[str, np.ndarray],
        num_tokens: int,
        *,
        ids: np.ndarray | None = None,
        weights: np.ndarray | None = None,
        forward_epoch: int = 0,
    ) -> list[int]:
        """Copy what peers read to the heap, signal source_ready, and wait for all ranks' signals.

        Each epoch waits for all ranks, also for those it pulls nothing from. So ranks are at most
        one epoch apart, and two copies of ids, weights and headers, by epoch parity, suffice.

        Args:
            forward_epoch: of a backward's forward, or of a planned forward's plan.

        Returns:
            the number of tokens of each rank.

        Raises:
            MismatchError: on every rank, if ranks made different calls.
        """
        parity = self.epoch & 1
        with self.step("compute", "publish"):
            for name, payload in payloads.items():
                mine = self.heap.array(name)
                if payload.ctypes.data != mine.ctypes.data:  # else it is layer.buffer()
                    mine[:num_tokens] = payload
            if ids is not None and weights is not None:
                limits = np.iinfo(np.int32)
                # Clip, so that an int64 id outside int32 stays out of range and does not wrap.
                clipped = np.clip(ids, limits.min, limits.max)
                self.heap.array(f"ids{parity}")[:num_tokens] = clipped
                self.heap.array(f"weights{parity}")[:num_tokens] = weights
            header = (
                self.epoch,
                OPERATIONS.index(operation),
                self.layer,
                self.shape.geometry.spec.digest(),
                forward_epoch,
                num_tokens,
            )
            for control_block in self.world.control_blocks:
                control_block["header"][parity, self.world.rank] = header
            self.world.fence()
            for peer in self.shape.geometry.ring():
                self.world.control_blocks[peer]["source_ready"][self.world.rank] = self.epoch
        begin = time.monotonic()
        with self.step("compute", "wait", flag="source_ready"):
            ready = self.world.control_block["source_ready"]
            for source in self.shape.geometry.ring():
                target = WaitTarget("source_ready", source, self.epoch, self.epoch)
                mismatch = functools.partial(in_collective, self.world, source)
                self.world.wait(value_of(ready, source), target, mismatch=mismatch)
        self.waited_us = 1e6 * (time.monotonic() - begin)
        headers = self.world.control_block["header"][parity]
        self._check_headers(headers)
        return [int(tokens) for tokens in headers["num_tokens"]]

    def read_routing(self, num_tokens: list[int]) -> RoutingTables:
        """Read the ids and weights of all ranks in this epoch."""
        spec, size, parity = self.shape.geometry.spec, self.world.size, self.epoch & 1
        ids = np.full((size, spec.max_tokens, spec.topk), -1, np.int32)
        weights = np.zeros(ids.shape, np.float32)
        for source in self.shape.geometry.ring():
            used = num_tokens[source]
            ids[source, :used] = self.heap.array(f"ids{parity}", source)[:used]
            weights[source, :used] = self.heap.array(f"weights{parity}", source)[:used]
        return RoutingTables(ids, weights, np.array(num_tokens, np.int32))

    def _check_headers(self, headers: np.ndarray) -> None:
        calls = [tuple(int(header[name]) for name in _CALL) for header in headers]
        if len(set(calls)) == 1:
            return
        text = f"ranks made different calls in epoch {self.epoch}: " + ", ".join(
            f"rank {rank}: {call_text(*call[:3])}"
            for rank, call in enumerate(calls, self.world.first_rank)
        )
        rank = self.world.rank + self.world.first_rank
        self.world.stop(Failure(kind="mismatch", waiter=rank, text=text, epoch=self.epoch))
        raise MismatchError(text)

    # ---- the two roles ----------------------------------------------------------------------

    @contextlib.contextmanager
    def step(
        self,
        role: str,
        name: str,
        tile: int = -1,
        *,
        local_bytes: int = 0,
        link_bytes: int = 0,
        flag: str = "",
    ) -> Iterator[None]:
        """Trace one step of a role. If it raises, the failure names the step and the tile."""
        self._current[role] = (name, tile)
        with self.tracer.span(
            role, name, tile, local_bytes=local_bytes, link_bytes=link_bytes, flag=flag
        ):
            yield

    def wait_filled(self, name: str, tile: int) -> None:
        """Compute role: wait until all rows of the M-tile are in place."""
        counter = self.tile_filled[name]
        begin = time.monotonic()
        if self._wait_own("compute", "tile_filled", counter, (tile,), self.shape.config.block_m):
            self.rows_waited_us += 1e6 * (time.monotonic() - begin)

    def wait_done(self, tiles: np.ndarray, chunk: int) -> None:
        """Comm role: wait until all N-tiles of the N-chunk are stored, for each of the M-tiles."""
        num_n_tiles = len(self.shape.config.n_tiles(*self.n_chunks[chunk]))
        for tile in tiles:
            self._wait_own("comm", "tile_done", self.tile_done, (int(tile), chunk), num_n_tiles)

    def wait_partials(self, contributor: int, block: int, chunk: int) -> None:
        """Comm role: wait until the contributor's partial rows of the token block are staged."""
        ready = self.heap.array("partials_ready")
        index = (contributor, block, chunk)
        if ready[index] < self.epoch:
            with self.step("comm", "wait", block, flag="partials_ready"):
                target = WaitTarget(
                    "partials_ready", contributor, self.epoch, self.epoch, block, chunk
                )
                self.world.wait(value_of(ready, index), target)
        else:
            self.world.fence()

    def _wait_own(
        self, role: str, flag: str, counter: np.ndarray, index: tuple[int, ...], expected: int
    ) -> bool:
        """Returns whether it had to wait."""
        if counter[index] >= expected:
            return False
        chunk = index[1] if len(index) > 1 else -1
        target = WaitTarget(flag, self.world.rank, expected, self.epoch, index[0], chunk)
        with self.step(role, "wait", index[0], flag=flag):
            self.world.wait(value_of(counter, index), target)
        return True

    def run(self, stages: list[Stage], *, overlapped: bool) -> None:
        """Run the stages (role, function) of a call.

        Args:
            overlapped: True: the stages of each role run in order, on a thread per role. False:
                all stages run in order on this thread.

        Raises:
            CometError: if the world has been stopped meanwhile.
        """
        if overlapped:
            self._run_overlapped(stages)
        else:
            for role, stage in stages:
                with self.guard(role):
                    stage()
        self.world.check_running()

    def _run_overlapped(self, stages: list[Stage]) -> None:
        errors: list[tuple[float, BaseException]] = []

        def run_role(role: str) -> None:
            try:
                with self.guard(role):
                    for owner, stage in stages:
                        if owner == role:
                            stage()
            except BaseException as error:
                errors.append((time.monotonic(), error))

        name = f"cometrt-rank{self.world.rank}-comm"
        comm = threading.Thread(target=run_role, args=("comm",), name=name, daemon=True)
        comm.start()
        run_role("compute")
        try:
            comm.join()  # returns, because all waits have deadlines
        except BaseException as error:  # Ctrl-C: end the other role's thread too
            self.world.stop_for(error, f" in epoch {self.epoch}")
            comm.join()
            raise
        if errors:
            raise first_original(errors)

    @contextlib.contextmanager
    def guard(self, role: str) -> Iterator[None]:
        """Stop the world if the role raises an error that its peers do not know of."""
        try:
            yield
        except CometError:
            raise  # the world is stopped already, or all ranks raise the same error
        except BaseException as error:
            name, tile = self._current.get(role, ("", -1))
            where = f" in {name}" if name else ""
            where += f" of tile {tile}" if tile >= 0 else ""
            self.world.stop_for(error, f"{where}, epoch {self.epoch}", tile)
            raise
