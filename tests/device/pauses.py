"""Pauses between a call's launches, and comparisons, on the device: the host waits for neither."""

from __future__ import annotations

import functools

import numpy as np

_KERNELS = r"""
extern "C" __global__ void spin(unsigned long long ns) {
  unsigned long long begin, now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(begin));
  do {
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  } while (now - begin < ns);
}

extern "C" __global__ void differ(const unsigned* found, const unsigned* expected,
                                  unsigned long long words, unsigned* count) {
  const unsigned long long step = gridDim.x * blockDim.x;
  for (unsigned long long i = blockIdx.x * blockDim.x + threadIdx.x; i < words; i += step) {
    if (found[i] != expected[i]) atomicAdd(count, 1u);
  }
}
"""


class Pauses:
    """Of one rank, on its stream.

    Attributes:
        next: before each of the launches to come, in us; none when it is used up.
    """

    def __init__(self):
        import cupy

        module = cupy.RawModule(code=_KERNELS)
        self._spin = module.get_function("spin")
        self.next = iter(())
        self._pause(1)  # loaded now: nothing waits on the device yet
        cupy.cuda.get_current_stream().synchronize()

    def hold_up(self, layer):
        """Before each launch of the fused layer's calls."""
        executor = layer._executor
        for owner, name in (
            (executor, "_publish"),
            (executor._planner, "prepare"),
            (executor._fused, "layer0"),
            (executor._fused, "layer1"),
            (executor, "_finish"),
        ):
            setattr(owner, name, functools.partial(self._late, getattr(owner, name)))

    def _late(self, launch, *args, **more):
        if pause := next(self.next, 0):
            self._pause(pause)
        launch(*args, **more)

    def _pause(self, microseconds):
        self._spin((1,), (1,), (np.uint64(1000 * int(microseconds)),))


class Differences:
    """How many words of numbered results are not what they should be."""

    def __init__(self, numbers):
        import cupy

        self._differ = cupy.RawModule(code=_KERNELS).get_function("differ")
        self._counts = cupy.zeros(numbers, cupy.uint32)
        self.count(0, self._counts, self._counts)
        self.read()

    def count(self, number, found, expected):
        if not found.nbytes:
            return
        count = self._counts.data.ptr + 4 * number
        words = found.data.ptr, expected.data.ptr, found.nbytes // 4, count
        self._differ((4,), (256,), tuple(map(np.uint64, words)))

    def read(self):
        """Waits for the device; counts begin again."""
        counts = self._counts.get()
        self._counts.data.memset_async(0, self._counts.nbytes)
        return counts
