"""Calls are queued: few launches, none of them waited for, and they may be captured in a graph."""

import numpy as np
import pytest

import cometrt
from cometrt.kernels import launch
from tests.cases import Case, make_inputs, on_device, on_host
from tests.device.test_failures import Rank

pytestmark = pytest.mark.gpu

_GATE = r"""
extern "C" __global__ void gate(volatile int* open) {
  unsigned long long begin, now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(begin));
  do {
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  } while (*open == 0 && now - begin < 5000000000ull);
}
"""


class Gate:
    """What is queued behind `close` begins after `open`, or five seconds later."""

    def __init__(self):
        import cupy

        self._memory = cupy.cuda.alloc_pinned_memory(4)
        self._flag = np.frombuffer(self._memory, np.int32, 1)
        self._kernel = cupy.RawKernel(_GATE, "gate")
        self.open()
        self.close_kernel()  # loaded now
        cupy.cuda.get_current_stream().synchronize()

    def close_kernel(self):
        self._kernel((1,), (1,), (np.uint64(self._memory.ptr),))

    def close(self):
        self._flag[0] = 0
        self.close_kernel()

    def open(self):
        self._flag[0] = 1


GRADIENTS = ("x", "topk_weights", "w_up", "w_down")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("ranks", [(1, 1), (4, 1)], ids=str)
def test_forwards_return_before_the_device_begins(ranks, training):
    case = Case(ranks, mode="fused", gemm="engine")
    inputs = make_inputs(case)

    def fn(world):
        import cupy

        rank = Rank(world, inputs, case.spec, case.config, case.mode)
        expected, _ = rank.forward(training=training)
        again = [rank.forward(training=training) for _ in range(2)]  # memory is there from now on
        rank.layer.synchronize()
        del again
        gate = Gate()
        world.barrier()
        gate.close()
        results = [rank.forward(training=training) for _ in range(2)]
        last = cupy.cuda.get_current_stream().record()
        assert not last.done
        world.barrier()
        gate.open()
        rank.layer.synchronize()
        for y, _ in results:
            assert on_host(y).tobytes() == on_host(expected).tobytes()

    cometrt.spawn(fn, case.size, "cuda", timeout_sec=10)


@pytest.mark.parametrize("save", ["rows", "z", "nothing"])
@pytest.mark.parametrize("mode", ["fused", "sequential", "chunked"])
@pytest.mark.parametrize("ranks", [(1, 1), (4, 1)], ids=str)
def test_backwards_return_before_the_device_begins(ranks, mode, save):
    case = Case(ranks, mode=mode, gemm="engine", save=save)
    inputs = make_inputs(case)

    def fn(world):
        import cupy

        rank = Rank(world, inputs, case.spec, case.config, mode)
        rank.layer.executor.graphs.enabled = False  # making one may wait for the device

        def steps():
            for _ in range(2):
                _, saved = rank.forward()
                yield rank.layer.backward(rank.dy, saved)

        expected, *_ = [list(steps()) for _ in range(3)]  # memory is there from now on
        rank.layer.synchronize()
        gate = Gate()
        world.barrier()
        gate.close()
        results = list(steps())
        last = cupy.cuda.get_current_stream().record()
        assert not last.done
        world.barrier()
        gate.open()
        rank.layer.synchronize()
        for gradients in results:
            for name in GRADIENTS:
                found, right = (on_host(getattr(g, name)) for g in (gradients, expected[0]))
                assert found.tobytes() == right.tobytes(), name

    cometrt.spawn(fn, case.size, "cuda", timeout_sec=10)


@pytest.mark.parametrize(("save", "most"), [("rows", 5), ("z", 5), ("nothing", 6)])
def test_a_backward_is_few_launches(save, most, monkeypatch):
    case = Case((1, 1), mode="fused", gemm="engine", save=save)
    inputs = make_inputs(case)
    launches = []
    real = launch.Kernel.__call__

    def counted(self, *args, **more):
        launches.append(self)
        real(self, *args, **more)

    def fn(world):
        rank = Rank(world, inputs, case.spec, case.config, case.mode)
        _, saved = rank.forward()
        monkeypatch.setattr(launch.Kernel, "__call__", counted)
        rank.layer.backward(rank.dy, saved)
        rank.layer.synchronize()

    cometrt.spawn(fn, 1, "cuda")
    assert 0 < len(launches) <= most


def test_a_forward_is_few_launches(monkeypatch):
    case = Case((1, 1), mode="fused", gemm="engine")
    inputs = make_inputs(case)
    launches = []
    real = launch.Kernel.__call__

    def counted(self, *args, **more):
        launches.append(self)
        real(self, *args, **more)

    def fn(world):
        rank = Rank(world, inputs, case.spec, case.config, case.mode)
        monkeypatch.setattr(launch.Kernel, "__call__", counted)
        rank.forward()
        rank.layer.synchronize()

    cometrt.spawn(fn, 1, "cuda")
    assert 0 < len(launches) <= 6


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("ranks", [(1, 1), (4, 1)], ids=str)
def test_calls_that_come_again_are_replayed(ranks, training):
    """With the same memory, that is: what lies in it may differ, and so may the tokens' number."""
    case = Case(ranks, mode="fused", gemm="engine")
    batches = [make_inputs(Case(ranks, routing)) for routing in ("uniform", "skewed")]

    def fn(world):
        rank = Rank(world, batches[0], case.spec, case.config, "fused")
        graphs = rank.layer.executor.graphs
        most = min(len(batch.x[world.rank]) for batch in batches)
        arrays = [
            [on_device(world)(part[world.rank][:most]) for part in (b.x, b.ids, b.weights)]
            for b in batches
        ]
        inputs = [array.copy() for array in arrays[0]]
        y = inputs[0].copy()

        def step(index, count):
            for array, new in zip(inputs, arrays[index], strict=True):
                array[...] = new
            y.fill(np.nan)
            args = [array[:count] for array in inputs]
            rank.layer.forward(*args, *rank.weights, training=training, out=y[:count])
            rank.layer.synchronize()
            return on_host(y[:count]).tobytes()

        kernels = rank.layer.executor.kernels
        publishes, publish = [], kernels["publish"]

        def counted(*args):
            publishes.append(args)
            publish(*args)

        kernels["publish"] = counted
        cases = [(index, count) for index in (0, 1) for count in (most, most // 2)]
        graphs.enabled = False
        expected = [step(*case) for case in cases]
        graphs.enabled = True
        for _ in range(4):
            launched = len(publishes)
            assert [step(*case) for case in cases] == expected
        assert len(publishes) - launched < len(cases)  # neither launched nor captured

    cometrt.spawn(fn, case.size, "cuda", timeout_sec=10)


@pytest.mark.parametrize("mode", ["fused", "sequential", "chunked"])
@pytest.mark.parametrize("ranks", [(1, 1), (4, 1), (4, 2)], ids=str)
def test_a_graph_is_replayed_with_new_tokens_and_routing(ranks, mode):
    case = Case(ranks, mode=mode, gemm="engine")
    batches = [make_inputs(Case(ranks, routing)) for routing in ("uniform", "skewed", "uniform")]
    count = min(len(x) for batch in batches for x in batch.x)
    assert count > 0

    def fn(world):
        import cupy

        rank = Rank(world, batches[0], case.spec, case.config, mode)
        arrays = [
            [cupy.asarray(part[world.rank][:count]) for part in (b.x, b.ids, b.weights)]
            for b in batches
        ]
        x, ids, weights = (array.copy() for array in arrays[0])
        y = cupy.empty_like(x)
        stream = cupy.cuda.get_current_stream()

        def forward(out):
            rank.layer.forward(x, ids, weights, *rank.weights, training=False, out=out)

        forward(y)
        rank.layer.synchronize()
        world.barrier()
        stream.begin_capture()
        forward(y)
        graph = stream.end_capture()
        graph.upload(stream)
        stream.synchronize()
        for batch in arrays:
            for target, source in zip((x, ids, weights), batch, strict=True):
                target[...] = source
            y.fill(np.nan)
            stream.synchronize()
            world.barrier()
            graph.launch(stream)
            world.barrier()
            rank.layer.synchronize()
            stream.synchronize()
            expected = cupy.empty_like(y)
            world.barrier()
            forward(expected)
            rank.layer.synchronize()
            assert on_host(y).tobytes() == on_host(expected).tobytes()
        ids[0, 0] = case.spec.num_experts  # wrong, on all ranks: the replay tells it
        stream.synchronize()
        world.barrier()
        graph.launch(stream)
        stream.synchronize()
        with pytest.raises(cometrt.RoutingError, match="rank 0, token 0, k 0"):
            rank.layer.synchronize()
        assert np.isnan(on_host(y).astype(np.float32)).all()

    cometrt.spawn(fn, case.size, "cuda", timeout_sec=10)


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("save", ["rows", "z", "nothing"])
@pytest.mark.parametrize("mode", ["fused", "sequential", "chunked"])
@pytest.mark.parametrize("ranks", [(1, 1), (4, 1), (4, 2)], ids=str)
def test_a_training_step_is_captured_and_replayed(ranks, mode, save, accumulate):
    case = Case(ranks, mode=mode, gemm="engine", save=save)
    batches = [make_inputs(Case(ranks, routing)) for routing in ("uniform", "skewed", "uniform")]
    count = min(len(x) for batch in batches for x in batch.x)
    assert count > 0

    def fn(world):
        import cupy

        rank = Rank(world, batches[0], case.spec, case.config, mode)
        arrays = [
            [cupy.asarray(part[world.rank][:count]) for part in (b.x, b.ids, b.weights, b.dy)]
            for b in batches
        ]
        *inputs, dy = (array.copy() for array in arrays[0])
        stream = cupy.cuda.get_current_stream()
        shapes = rank.layer.geometry.w_up_shape, rank.layer.geometry.w_down_shape

        def new_gradients():
            totals = [cupy.empty(shape, cupy.float32) for shape in shapes]
            return cometrt.Gradients(cupy.empty_like(dy), cupy.empty_like(inputs[2]), *totals)

        def step(y, gradients):
            _, saved = rank.layer.forward(*inputs, *rank.weights, out=y)
            rank.layer.backward(dy, saved, out=gradients, accumulate=accumulate)

        def results(y, gradients):
            return [on_host(array).tobytes() for array in (y, *gradients)]

        def poison(y, gradients):
            for array in (y, *gradients):
                array.fill(np.nan)
            for total in gradients[2:]:
                if accumulate:
                    total.fill(0.5)
            stream.synchronize()
            world.barrier()

        captured, launched = ((cupy.empty_like(dy), new_gradients()) for _ in range(2))
        poison(*launched)
        step(*launched)
        rank.layer.synchronize()
        world.barrier()
        stream.begin_capture()
        step(*captured)
        graph = stream.end_capture()
        graph.upload(stream)
        stream.synchronize()
        for batch in arrays:
            for target, source in zip((*inputs, dy), batch, strict=True):
                target[...] = source
            poison(*captured)
            graph.launch(stream)
            world.barrier()
            rank.layer.synchronize()
            stream.synchronize()
            poison(*launched)
            step(*launched)
            rank.layer.synchronize()
            assert results(*captured) == results(*launched)
        # A replay with wrong routing, and its backward, which is queued behind it.
        inputs[1][0, 0] = case.spec.num_experts
        poison(*captured)
        graph.launch(stream)
        stream.synchronize()
        with pytest.raises(cometrt.RoutingError, match="rank 0, token 0, k 0"):
            rank.layer.synchronize()
        y, gradients = captured
        for array in (y, gradients.x, gradients.topk_weights):
            assert np.isnan(on_host(array).astype(np.float32)).all()
        for total in gradients[2:]:
            assert (on_host(total) == 0.5).all() if accumulate else np.isnan(on_host(total)).all()

    cometrt.spawn(fn, case.size, "cuda", timeout_sec=10)


@pytest.mark.parametrize("ranks", [(1, 1), (4, 1)], ids=str)
def test_backwards_that_come_again_are_replayed(ranks):
    case = Case(ranks, mode="sequential", gemm="engine")
    inputs = make_inputs(case)

    def fn(world):
        rank = Rank(world, inputs, case.spec, case.config, case.mode)
        kernels = rank.layer.executor.kernels
        launches, real = [], kernels["wgrad"]

        def counted(*args):
            launches.append(args)
            real(*args)

        kernels["wgrad"] = counted
        expected = rank.step().digest()
        counts = []
        for _ in range(40):  # the allocator's addresses come again after a few steps
            assert rank.step().digest() == expected
            counts.append(len(launches))
        assert counts[-1] == counts[-8]  # neither launched nor captured

    cometrt.spawn(fn, case.size, "cuda", timeout_sec=10)


def test_a_cublas_backward_is_not_captured():
    case = Case((1, 1), mode="sequential", gemm="cublas")
    inputs = make_inputs(case)

    def fn(world):
        import cupy

        rank = Rank(world, inputs, case.spec, case.config, case.mode)
        _, saved = rank.forward()
        rank.layer.synchronize()
        stream = cupy.cuda.get_current_stream()
        stream.begin_capture()
        with pytest.raises(ValueError, match="backward must not be captured"):
            rank.layer.backward(rank.dy, saved)
        stream.end_capture()

    cometrt.spawn(fn, 1, "cuda")
