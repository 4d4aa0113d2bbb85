"""`spawn`: virtual ranks, which are threads of one process."""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np

from cometrt.errors import first_original
from cometrt.specs import check_choice, check_int, check_timeout
from cometrt.world.base import World
from cometrt.world.blas import pin_blas_threads, unpin_blas_threads
from cometrt.world.failure import WaitTarget
from cometrt.world.link import LINKS, link_share
from cometrt.world.partitions import (
    check_driver,
    check_gpu,
    gpu_sms,
    num_sms,
    rank_partitions,
    ranks_share_gpu,
)

Result = TypeVar("Result")

_MIN_GRACE_SEC = 2.0
_POLL_SEC = 0.1  # interval at which `spawn` checks whether a rank has raised
# Arguments of World.wait while there are no control blocks yet.
_NO_CONTROL_BLOCKS: dict[str, Any] = {"even_if_stopped": True, "gone": str}


class _Process:
    """The state that the ranks of one `spawn` share."""

    def __init__(self, size: int, shares_gpu: bool) -> None:
        self.size, self.shares_gpu = size, shares_gpu
        self.interrupted = False
        self.lock = threading.Lock()
        self.device_memory: list[Any] = []  # kept until all ranks have ended
        self.allocations: dict[int, dict[int, np.ndarray]] = {}  # [allocation number][rank]


class ThreadWorld(World):
    """The world of a rank of `spawn`."""

    def __init__(self, rank: int, process: _Process, device: str, timeout_sec: float) -> None:
        self._process = process
        super().__init__(rank, process.size, device, timeout_sec)

    def allocate_host(self, nbytes: int) -> list[np.ndarray]:
        memory = np.zeros(nbytes, np.uint8)
        with self._process.lock:
            ranks = self._process.allocations.setdefault(self._num_allocations, {})
            ranks[self.rank] = memory
        how = {} if self._num_allocations else _NO_CONTROL_BLOCKS
        for peer in range(self.size):
            target = WaitTarget("rendezvous", peer, 1)
            self.wait(functools.partial(ranks.__contains__, peer), target, **how)
        with self._process.lock:  # all ranks have read the earlier allocations
            for number in [n for n in self._process.allocations if n < self._num_allocations]:
                del self._process.allocations[number]
        return [ranks[rank] for rank in range(self.size)]

    def fence(self) -> None:
        pass  # the interpreter lock orders the accesses of threads

    @property
    def shares_gpu(self) -> bool:
        return self._process.shares_gpu

    @property
    def shares_process(self) -> bool:
        return self.size > 1

    def share_device_memory(self, pointer: int) -> list[int]:
        return self.allgather(pointer, purpose="device memory")

    def close_device_memory(self, pointer: int) -> None:
        pass  # the memory of this process needs no closing

    def _leave(self) -> None:
        self.control_block["closing"][0] = 1
        self._leave_at_once()

    def _leave_at_once(self) -> None:
        if self.gpu:
            self._process.device_memory.append(self.gpu)  # a peer's kernel may still write to it
            self.gpu.close()


def spawn(
    fn: Callable[[World], Result],
    ranks: int,
    device: str = "host",
    *,
    link: str | None = None,
    timeout_sec: float = 30.0,
) -> list[Result]:
    """Run ``fn(world)`` on `ranks` virtual ranks, each on a thread of this process.

    Args:
        fn: called once per rank with the rank's world, which is closed when fn returns.
        ranks: W, at least 1.
        device: "host" or "cuda". On "cuda" each rank has a GPU of its own if there are enough,
            else a partition of one. Python's cyclic garbage collector is off until spawn returns.
        link: "h100", "h200" or "h800": emulate that link between partitions of one GPU. Transfers
            between ranks are limited to its rate, scaled to a rank's share of the SMs. None: no
            limit.
        timeout_sec: the longest time that a single wait of a rank may last, in seconds.

    Returns:
        fn's results in rank order.

    Raises:
        ValueError: for a wrong argument.
        PeerTimeout: if a rank's thread does not start within timeout_sec.
        Exception: the first that a rank raised. The waits of the other ranks end at once. A rank
            that runs code of its own has timeout_sec more, at least 2 s. Then spawn returns
            without it; its daemon thread can no longer use its world.
    """
    ranks = check_int("ranks", ranks, minimum=1)
    timeout_sec = check_timeout(timeout_sec)
    if device == "cuda":
        # CUDA reads it when it starts. With fewer hardware queues the streams of several ranks
        # would share one, and a stream would wait behind another rank's waiting kernel.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    check_device(device)
    if not callable(fn):
        raise ValueError(f"fn must be callable with a world (got {fn!r})")
    if link is not None:
        check_choice("link", link, tuple(LINKS))
        if device != "cuda":
            raise ValueError(f"link must be None on device={device!r} (got {link!r})")

    paused = pause_garbage_collector() if device == "cuda" and ranks > 1 else None
    pin_blas_threads()  # on this thread and not on the ranks' threads: see cometrt/world/blas.py
    try:
        with paused or contextlib.nullcontext():
            return _run_ranks(fn, ranks, device, link, timeout_sec)
    finally:
        unpin_blas_threads()


@contextlib.contextmanager
def pause_garbage_collector() -> Iterator[None]:
    """Disable cyclic garbage collection within the context.

    It could free streams, memory or library handles of earlier worlds. That may wait for kernels,
    which may wait for a peer: a deadlock.
    """
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _run_ranks(
    fn: Callable[[World], Result], ranks: int, device: str, link: str | None, timeout_sec: float
) -> list[Result]:
    shares_gpu = device == "cuda" and ranks_share_gpu(ranks, link)
    on_host = device == "host"
    for gpu in [] if on_host else [0] if shares_gpu else range(ranks):
        check_gpu(gpu)
    partitions = (
        [contextlib.nullcontext()] * ranks if on_host else rank_partitions(ranks, share=shares_gpu)
    )
    process = _Process(ranks, shares_gpu)
    results: list[Any] = [None] * ranks
    errors: list[tuple[float, BaseException]] = []
    worlds: list[ThreadWorld | None] = [None] * ranks

    def run(rank: int) -> None:
        world = None
        try:
            with partitions[rank]:
                world = worlds[rank] = ThreadWorld(rank, process, device, timeout_sec)
                if process.interrupted:  # the main thread could not abandon this world yet
                    raise KeyboardInterrupt
                if link is not None:
                    world.link = link_share(link, num_sms(), gpu_sms())
                results[rank] = fn(world)
                world.close()
        except BaseException as error:
            errors.append((time.monotonic(), error))
            if world is not None:
                world.abandon(error)

    threads = [
        threading.Thread(target=run, args=(rank,), name=f"cometrt-rank{rank}", daemon=True)
        for rank in range(ranks)
    ]
    for thread in threads:
        thread.start()
    grace_sec = max(timeout_sec, _MIN_GRACE_SEC)
    try:
        while any(thread.is_alive() for thread in threads):
            if errors and time.monotonic() > errors[0][0] + grace_sec:
                break
            for thread in threads:
                thread.join(_POLL_SEC / ranks)
    except BaseException as error:  # Ctrl-C
        process.interrupted = True
        _abandon(worlds, error)
        raise
    stuck = [rank for rank, thread in enumerate(threads) if thread.is_alive()]
    if stuck:
        _abandon(worlds, errors[0][1])
        for rank in stuck:
            threads[rank].name = f"left behind: {threads[rank].name}"
    for memory in process.device_memory:
        with contextlib.suppress(Exception):  # a rank has already raised the error of the device
            memory.drain()
    if errors:
        first = first_original(errors)
        if stuck:
            first.add_note(
                f"ranks {stuck} have not ended {grace_sec:g} s later, and were left behind"
            )
        raise first
    return results


def _abandon(worlds: list[ThreadWorld | None], error: BaseException) -> None:
    """Abandon all worlds that are still open: their waits end and further calls are refused."""
    for world in worlds:
        if world is not None:
            world.abandon(error)


def check_device(device: str) -> None:
    """Raise a ValueError if the device is unknown, or "cuda" without a usable GPU."""
    check_choice("device", device, ("host", "cuda"))
    if device == "cuda":
        try:
            import cupy

            if cupy.cuda.runtime.getDeviceCount() < 1:
                raise RuntimeError("no GPU is visible")
        except Exception as error:  # CuPy has error types of its own
            with contextlib.suppress(ImportError, AttributeError):
                check_driver()  # explains more if the driver is the reason
            raise ValueError(
                f"device='cuda' needs an NVIDIA GPU and the cuda13 extra ({error})"
            ) from error
