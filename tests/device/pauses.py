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

__device__ double value(const void* values, unsigned long long i, int is_bf16) {
  if (!is_bf16) return static_cast<const float*>(values)[i];
  const unsigned upper = static_cast<const unsigned short*>(values)[i];
  return __uint_as_float(upper << 16);
}

// sums[0] += |found - expected|^2, sums[1] += |expected|^2; NaN stays.
extern "C" __global__ void distance(const void* found, const void* expected,
                                    unsigned long long count, int is_bf16, double* sums) {
  const unsigned long long step = gridDim.x * blockDim.x;
  double far = 0, norm = 0;
  for (unsigned long long i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step) {
    const double e = value(expected, i, is_bf16), d = value(found, i, is_bf16) - e;
    far += d * d, norm += e * e;
  }
  atomicAdd(&sums[0], far);
  atomicAdd(&sums[1], norm);
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
        self.pause(1)  # loaded now: nothing waits on the device yet
        cupy.cuda.get_current_stream().synchronize()

    def hold_up(self, layer):
        """Before each launch of the fused layer's calls."""
        kernels = layer.executor.kernels
        forward = "publish", "await_sources", "prepare", "dispatch_gemm", "gemm_combine", "finish"
        planned = "plan", "prepare_planned"
        backward = "prepare_backward", "dispatch_down_dgrad", "up_dgrad_combine_wgrad"
        for name in (*forward, *planned, *backward):
            kernels[name] = functools.partial(self._late, kernels[name])

    def _late(self, launch, *args):
        if pause := next(self.next, 0):
            self.pause(pause)
        launch(*args)

    def pause(self, microseconds):
        self._spin((1,), (1,), (np.uint64(1000 * int(microseconds)),))


class Differences:
    """How many words of numbered results are not what they should be; how far others are off."""

    def __init__(self, numbers):
        import cupy

        module = cupy.RawModule(code=_KERNELS)
        self._differ, self._distance = map(module.get_function, ("differ", "distance"))
        self._counts = cupy.zeros(numbers, cupy.uint32)
        self._sums = cupy.zeros((numbers, 2), cupy.float64)
        self.count(0, self._counts, self._counts)
        self.measure(0, self._sums.view(cupy.float32), self._sums.view(cupy.float32))
        self.read()
        self.read_errors()

    def count(self, number, found, expected):
        if not found.nbytes:
            return
        count = self._counts.data.ptr + 4 * number
        words = found.data.ptr, expected.data.ptr, found.nbytes // 4, count
        self._differ((4,), (256,), tuple(map(np.uint64, words)))

    def measure(self, number, found, expected):
        """Of bf16 or float32; several with the same number count as one."""
        if not found.size:
            return
        words = found.data.ptr, expected.data.ptr, found.size
        sums = np.uint64(self._sums.data.ptr + 16 * number)
        kind = np.int32(found.dtype.itemsize == 2)
        self._distance((4,), (256,), (*map(np.uint64, words), kind, sums))

    def read_errors(self):
        """Relative errors (norms). Waits for the device; sums begin again."""
        distances, norms = self._sums.get().T
        self._sums.data.memset_async(0, self._sums.nbytes)
        return np.sqrt(distances / np.maximum(norms, 1e-30))

    def read(self):
        """Waits for the device; counts begin again."""
        counts = self._counts.get()
        self._counts.data.memset_async(0, self._counts.nbytes)
        return counts
