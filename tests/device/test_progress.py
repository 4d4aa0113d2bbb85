"""Any number of resident blocks makes progress: other kernels may hold SMs for as long as they run,
and a call's stream may have fewer than the layer was made for."""

import contextlib
import time

import numpy as np
import pytest

import cometrt
from cometrt.world import partitions
from tests.cases import Case, check_case, make_inputs
from tests.device.test_failures import Rank

pytestmark = pytest.mark.gpu

_HOLD = r"""
extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(1024)
    hold(volatile int* open, int* here) {
  extern __shared__ int all_of_it[];
  if (threadIdx.x == 0) {
    atomicAdd_system(here, 1);
    while (*open == 0) {
    }
  }
  __syncthreads();
}
"""
_SM_BYTES = 200 * 1024  # of shared memory: nothing else fits beside such a block


class Holder:
    """Blocks that spin on another stream of this rank's SMs, one an SM, in pairs as a GEMM's."""

    def __init__(self):
        import cupy

        self._memory = cupy.cuda.alloc_pinned_memory(8)
        self._open, self._here = np.frombuffer(self._memory, np.int32, 2).reshape(2, 1)
        self._kernel = cupy.RawKernel(_HOLD, "hold")
        self._kernel.max_dynamic_shared_size_bytes = _SM_BYTES
        self._stream = partitions.auxiliary_stream(7)
        with self.holding(2):  # loaded now
            pass

    @contextlib.contextmanager
    def holding(self, sms):
        self._open[0] = self._here[0] = 0
        words = np.uint64(self._memory.ptr), np.uint64(self._memory.ptr + 4)
        with self._stream:
            self._kernel((sms,), (1024,), words, shared_mem=_SM_BYTES)
        try:
            deadline = time.monotonic() + 5
            while self._here[0] < sms:  # all are there
                assert time.monotonic() < deadline
            yield
        finally:
            self._open[0] = 1
            self._stream.synchronize()


def wait_for(layer, seconds):
    """Whether the layer's calls end while others hold SMs."""
    begin = time.monotonic()
    while not layer.executor.ended.done and time.monotonic() - begin < seconds:
        time.sleep(1e-3)
    return layer.executor.ended.done


@pytest.mark.parametrize("left", [0.9, 0.5, 2])
@pytest.mark.parametrize("mode", ["fused", "sequential", "chunked"])
@pytest.mark.parametrize("ranks", [(1, 1), (4, 1), (4, 2)], ids=str)
def test_other_kernels_hold_sms(ranks, mode, left):
    # A share of the SMs is left, or one pair of them, as a cluster needs.
    case = Case(ranks, "skewed", mode=mode, gemm="engine")
    inputs = make_inputs(case)

    def fn(world):
        rank = Rank(world, inputs, case.spec, case.config, mode)
        rank.step()
        holder, sms = Holder(), partitions.num_sms()
        world.barrier()
        held = sms - left if left >= 2 else round(sms * (1 - left) / 2) * 2
        with holder.holding(held):
            world.barrier()
            _, saved = rank.forward()
            assert wait_for(rank.layer, 5)
            rank.layer.backward(rank.dy, saved)
            assert wait_for(rank.layer, 5)
            world.barrier()
        return rank.step()

    check_case(case, inputs, cometrt.spawn(fn, case.size, "cuda", timeout_sec=8))


@pytest.mark.parametrize("num_comm", [None, 1, 5])
@pytest.mark.parametrize("parts", [15, 4])  # of 8 and 32 SMs
def test_a_stream_of_fewer_sms(parts, num_comm):
    # Several tiles an expert, several blocks of tokens, as many CTAs as the whole GPU has SMs.
    spec = cometrt.MoESpec(hidden=512, intermediate=256, num_experts=16, topk=4, max_tokens=2000)
    config = cometrt.TileConfig(dispatch_ctas=num_comm, combine_ctas=num_comm)
    rng = np.random.default_rng(0)

    def fn(world):
        import cupy

        layer = cometrt.MoELayer(world, spec, "fused", config=config)
        bf = lambda *s: cupy.asarray((rng.standard_normal(s) / 16).astype(spec.numpy_dtype))  # noqa: E731
        ids = np.argsort(rng.random((2000, 16)), axis=1)[:, :4].astype(np.int32)
        tables = bf(2000, 512), cupy.asarray(ids), cupy.asarray(rng.random((2000, 4), np.float32))
        weights = bf(16, 512, 512), bf(16, 512, 256)
        dy = bf(2000, 512)
        y, saved = layer.forward(*tables, *weights)
        grads = layer.backward(dy, saved)
        layer.synchronize()
        narrow = partitions.split_gpu(parts)[0]
        assert narrow.num_sms < partitions.gpu_sms()
        for _ in range(3):
            y2, saved = layer.forward(*tables, *weights, stream=narrow.stream)
            grads2 = layer.backward(dy, saved, stream=narrow.stream)
            layer.synchronize()
            assert y2.get().tobytes() == y.get().tobytes()
            assert grads2.x.get().tobytes() == grads.x.get().tobytes()

    cometrt.spawn(fn, 1, "cuda", timeout_sec=8)
