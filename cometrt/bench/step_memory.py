"""How much memory of its GPU a rank takes at the peak of a training step."""

from __future__ import annotations

import threading
from typing import Any

import cupy as cp

import cometrt
from cometrt.memory import memory_of


class Allocations:
    """Context that counts what this thread allocates from CuPy's pool.

    Attributes:
        now: bytes allocated within the context and not freed yet.
        peak: the most that `now` has been.
        hook: CuPy's, which calls `allocated` and `freed`.
    """

    def __init__(self) -> None:
        self.now = self.peak = 0
        self._live: dict[int, int] = {}  # bytes by address
        self._lock = threading.Lock()
        counter = self

        class Hook(cp.cuda.MemoryHook):
            name = f"Allocations {id(counter)}"

            def malloc_postprocess(self, **of: Any) -> None:
                counter.allocated(of["mem_ptr"], of["mem_size"])

            def free_postprocess(self, **of: Any) -> None:
                counter.freed(of["mem_ptr"])

        self.hook = Hook()

    def allocated(self, address: int, nbytes: int) -> None:
        with self._lock:
            self._live[address] = nbytes
            self.now += nbytes
            self.peak = max(self.peak, self.now)

    def freed(self, address: int) -> None:
        """What was allocated before the context does not count."""
        with self._lock:
            self.now -= self._live.pop(address, 0)

    def __enter__(self) -> Allocations:
        self.hook.__enter__()
        return self

    def __exit__(self, *raised: object) -> None:
        self.hook.__exit__(*raised)


def heap_bytes(layer: cometrt.MoELayer) -> int:
    """Of what peers reach; it holds the layer's x."""
    return memory_of(layer.shape, layer.world.device, layer.mode, training=True).heap
