"""`MoESpec.memory` is what is allocated on the GPU, and outgrown memory is given back."""

import dataclasses

import pytest

import cometrt
from tests.cases import Case, check_case, make_inputs, on_device
from tests.device.test_failures import Rank

pytestmark = pytest.mark.gpu
MODES = [
    ("fused", "engine"),
    ("sequential", "engine"),
    ("sequential", "cublas"),
    ("chunked", "engine"),
]


def used_by(call, pool):
    """Bytes of CuPy's pool that are used more after a call, and at most during it."""
    import cupy

    class Watch(cupy.cuda.MemoryHook):
        name = "watch"
        most = 0

        def malloc_postprocess(self, **_):
            self.most = max(self.most, pool.used_bytes())

    watch, before = Watch(), pool.used_bytes()
    with watch:
        result = call()
        cupy.cuda.get_current_stream().synchronize()
    return pool.used_bytes() - before, watch.most - before, result


@pytest.mark.parametrize("save", ["rows", "z", "nothing"])
@pytest.mark.parametrize(("mode", "gemm"), MODES)
def test_memory_is_what_is_allocated(mode, gemm, save):
    import cupy

    case = Case((1, 1), mode=mode, gemm=gemm, save=save)
    inputs = make_inputs(case)

    def measured(world, pool):
        held, _, rank = used_by(lambda: Rank(world, inputs, case.spec, case.config, mode), pool)
        arguments = [rank.x, rank.dy, rank.ids, rank.topk_weights, *rank.weights]
        held -= sum(-(-array.nbytes // 512) * 512 for array in arguments)
        y, grads = (on_device(world)(inputs.x[0]) for _ in range(2))
        _, inference, _ = used_by(lambda: rank.forward(training=False, out=y), pool)
        kept, forward, (_, saved) = used_by(lambda: rank.forward(out=y), pool)
        grads = rank.layer.backward(rank.dy, saved)
        rank.layer.synchronize()
        _, saved = rank.forward(out=y)
        _, backward, _ = used_by(lambda: rank.layer.backward(rank.dy, saved, out=grads), pool)
        rank.layer.synchronize()
        regions = ("data", "flags", "routing0", "routing1")
        heap = sum(world.regions.nbytes(name) for name in regions)
        *arrays, _, _ = saved
        return held, inference, forward - kept, backward, heap, sum(a.nbytes for a in arrays)

    def fn(world):
        pool = cupy.cuda.MemoryPool()  # what earlier tests left is not counted
        with cupy.cuda.using_allocator(pool.malloc):
            return measured(world, pool)

    ((held, inference, forward, backward, heap, residuals),) = cometrt.spawn(fn, 1, "cuda")
    how = {"mode": mode, "config": case.config}
    found = case.spec.memory(1, training=False, **how)
    assert found.scratch == held + inference
    found = case.spec.memory(1, **how)
    assert found.scratch == held + max(forward, backward)
    assert found.residuals == residuals
    assert 0 < found.heap - heap < 1 << 16  # the control block


@pytest.mark.parametrize("ranks", [2, 4])
def test_memory_goes_with_the_layers_that_needed_it(ranks):
    case = Case((ranks, 1), mode="fused", gemm="engine")
    inputs = make_inputs(case)
    large = dataclasses.replace(case.spec, max_tokens=40000)

    def fn(world):
        rank = Rank(world, inputs, case.spec, case.config, "fused")
        small, view = world.regions.nbytes("data"), rank.layer.buffer()[:2]
        view[...] = 5
        for _ in range(3):
            layer = cometrt.MoELayer(world, large, config=case.config)
            assert world.regions.nbytes("data") > 100 * small
            rank.step()
            layer.close()
            again = cometrt.MoELayer(world, case.spec, config=case.config)
            assert world.regions.nbytes("data") == small
            assert len(world.gpu.own) == 5  # the control block and four regions
            rank.step()
            again.close()
        assert (view == 5).all()
        return rank.step()

    check_case(case, inputs, cometrt.spawn(fn, ranks, "cuda", timeout_sec=20))


def test_memory_of_captured_calls_is_kept():
    case = Case((1, 1), mode="fused", gemm="engine")
    inputs = make_inputs(case)
    large = dataclasses.replace(case.spec, max_tokens=400)

    def fn(world):
        import cupy

        rank, y = Rank(world, inputs, case.spec, case.config, "fused"), None
        stream, y = cupy.cuda.get_current_stream(), cupy.empty_like(rank.x)
        rank.forward(training=False, out=y)
        rank.layer.synchronize()
        right = y.copy()
        stream.begin_capture()
        rank.forward(training=False, out=y)
        graph = stream.end_capture()
        layer = cometrt.MoELayer(world, large, config=case.config)
        y[...] = 0
        graph.launch(stream)
        stream.synchronize()
        assert (y.view(cupy.uint16) == right.view(cupy.uint16)).all()
        layer.close()

    cometrt.spawn(fn, 1, "cuda")
