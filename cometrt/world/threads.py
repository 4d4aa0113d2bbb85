"""Virtual ranks of one process: each rank is a thread, its memory plain NumPy arrays."""

from __future__ import annotations

import contextlib
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
from cometrt.world.failure import Wanted
from cometrt.world.link import LINKS, link_share
from cometrt.world.partitions import (
    check_driver,
    check_gpu,
    gpu_seats,
    gpu_sms,
    num_sms,
    ranks_share_gpu,
)

Result = TypeVar("Result")


class _Process:
    """What the ranks of one `spawn` share: the memory each of them allocated."""

    def __init__(self, size: int, shares_gpu: bool) -> None:
        self.size, self.shares_gpu = size, shares_gpu
        self.lock = threading.Lock()
        self.device_memory: list[Any] = []  # freed when no rank is left
        self.allocations: dict[int, dict[int, np.ndarray]] = {}  # by number, by rank


class ThreadWorld(World):
    """A rank of `spawn`."""

    def __init__(self, rank: int, process: _Process, device: str, timeout_sec: float) -> None:
        self._process = process
        super().__init__(rank, process.size, device, timeout_sec)

    def _allocate(self, nbytes: int) -> list[np.ndarray]:
        memory = np.zeros(nbytes, np.uint8)
        with self._process.lock:
            ranks = self._process.allocations.setdefault(self._num_allocations, {})
            ranks[self.rank] = memory
        first = self._num_allocations == 0  # the boards themselves: no board to look at yet
        for peer in range(self.size):
            wanted = Wanted("rendezvous", peer, 1)
            self.wait(lambda p=peer: p in ranks, wanted, even_if_stopped=first)  # type: ignore[misc]
        return [ranks[rank] for rank in range(self.size)]

    def fence(self) -> None:
        pass  # threads of one interpreter: taking the interpreter lock orders their accesses

    @property
    def shares_gpu(self) -> bool:
        return self._process.shares_gpu

    @property
    def shares_process(self) -> bool:
        return self.size > 1

    def share_device_memory(self, pointer: int) -> list[int]:
        return self.allgather(pointer, purpose="device memory")

    def close_device_memory(self, pointer: int) -> None:
        pass  # of this process: freed with it

    def _free(self) -> None:
        if self.gpu:
            self._process.device_memory.append(self.gpu)  # a peer may still be writing
            self.gpu.close()

    def abandon(self, error: BaseException) -> None:
        already = self._closed
        super().abandon(error)
        if not already:
            self._free()


def spawn(
    fn: Callable[[World], Result],
    ranks: int,
    device: str = "host",
    *,
    link: str | None = None,
    timeout_sec: float = 30.0,
) -> list[Result]:
    """Run ``fn(world)`` once a rank, each on a thread of this process.

    Args:
        fn: called with the rank's world, which is closed when it returns.
        ranks: W, at least 1.
        device: "host"; or "cuda": one GPU a rank if there are enough, else partitions of one. On
            "cuda" the process's cyclic garbage collector rests until spawn returns.
        link: "h100", "h200" or "h800": ranks are partitions of one GPU, however many there are,
            and what crosses them goes at that link's rate, scaled to a rank's part of the GPU;
            None: as fast as it can.
        timeout_sec: longest that any single wait of a rank may last.

    Returns:
        fn's results in rank order.

    Raises:
        ValueError: for a wrong argument.
        PeerTimeout: if a rank's thread does not start within timeout_sec.
        Exception: the first one that a rank raised; the others' waits end at once.
    """
    ranks = check_int("ranks", ranks, minimum=1)
    timeout_sec = check_timeout(timeout_sec)
    if device == "cuda":
        # Read when CUDA starts: with fewer hardware queues, streams of several ranks would share
        # one, and wait behind each other's waiting kernels.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    check_device(device)
    if not callable(fn):
        raise ValueError(f"fn must be callable with a world (got {fn!r})")
    if link is not None:
        check_choice("link", link, tuple(LINKS))
        if device != "cuda":
            raise ValueError(f"link must be None on device={device!r} (got {link!r})")

    if device == "cuda" and ranks > 1:
        with collector_at_rest():
            return _run_ranks(fn, ranks, device, link, timeout_sec)
    return _run_ranks(fn, ranks, device, link, timeout_sec)


@contextlib.contextmanager
def collector_at_rest() -> Iterator[None]:
    """No cyclic garbage collection within: what it would free on the device (streams, memory,
    library handles of worlds gone by) may wait for kernels that wait for a peer."""
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
    seats = [contextlib.nullcontext()] * ranks if on_host else gpu_seats(ranks, share=shares_gpu)
    process = _Process(ranks, shares_gpu)
    results: list[Any] = [None] * ranks
    errors: list[tuple[float, BaseException]] = []
    worlds: list[ThreadWorld | None] = [None] * ranks

    def run(rank: int) -> None:
        world = None
        try:
            with seats[rank]:
                world = worlds[rank] = ThreadWorld(rank, process, device, timeout_sec)
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
    try:
        for thread in threads:
            thread.join()
    except BaseException as error:  # Ctrl-C: let the ranks' waits end before leaving
        for world in worlds:
            if world is not None:
                world.abandon(error)
        raise
    for memory in process.device_memory:
        with contextlib.suppress(Exception):  # what broke the device has been raised already
            memory.drain()
    if errors:
        raise first_original(errors)
    return results


def check_device(device: str) -> None:
    check_choice("device", device, ("host", "cuda"))
    if device == "cuda":
        try:
            import cupy

            if cupy.cuda.runtime.getDeviceCount() < 1:
                raise RuntimeError("no GPU is visible")
        except Exception as error:  # CuPy raises types of its own
            with contextlib.suppress(ImportError, AttributeError):
                check_driver()  # where that is why
            raise ValueError(
                f"device='cuda' needs an NVIDIA GPU and the cuda13 extra ({error})"
            ) from error
