"""What a layer does with arrays on the device: where they lie, when they are read, for how long."""

import weakref

import numpy as np
import pytest

import cometrt
from tests.cases import Case, make_inputs, on_host
from tests.device.pauses import Pauses
from tests.device.test_async import Gate
from tests.device.test_failures import Rank

pytestmark = pytest.mark.gpu
CASE = Case((2, 1), mode="fused", gemm="engine")


def shifted(array, nbytes):
    """A copy that begins `nbytes` past a multiple of 256."""
    import cupy

    memory = cupy.empty(array.nbytes + 256, cupy.uint8)
    view = memory[nbytes : nbytes + array.nbytes].view(array.dtype).reshape(array.shape)
    view[...] = array
    return view


class Foreign:
    """An array of another library, of which nothing is known but DLPack, as JAX's are."""

    def __init__(self, array, stream=None):
        self._array, self._stream = array, stream

    def __dlpack_device__(self):
        return self._array.__dlpack_device__()

    def __dlpack__(self, *, stream=None, **_):
        import cupy

        if self._stream is not None and stream not in (None, -1):
            ready = self._stream.record()
            cupy.cuda.ExternalStream(0 if stream < 2 else stream).wait_event(ready)
        return self._array.__dlpack__(stream=-1)


FORWARD = ("x", "topk_ids", "topk_weights", "w_up", "w_down")
OUTPUTS = ("x", "topk_weights", "w_up", "w_down")


@pytest.mark.parametrize("name", [*FORWARD, "out", "dy", *(f"out.{name}" for name in OUTPUTS)])
def test_where_an_array_must_begin(name):
    inputs = make_inputs(CASE)
    wide = name not in ("topk_ids", "topk_weights", "out.topk_weights")

    def fn(world):
        import cupy

        rank = Rank(world, inputs, CASE.spec, CASE.config)
        arrays = dict(
            zip(FORWARD, (rank.x, rank.ids, rank.topk_weights, *rank.weights), strict=True)
        )
        y, saved = rank.layer.forward(**arrays)
        grads = rank.layer.backward(rank.dy, saved)
        rank.layer.synchronize()
        grads = grads._replace(w_up=grads.w_up.astype(cupy.float32))

        def call(move):
            """A forward and a backward with that array moved."""
            forward, more, gradients, dy = dict(arrays), {}, grads, rank.dy
            if name in forward:
                forward[name] = move(forward[name])
            elif name == "out":
                more = {"out": move(y)}
            elif name == "dy":
                dy = move(dy)
            else:
                field = name.removeprefix("out.")
                gradients = grads._replace(**{field: move(getattr(grads, field))})
            result, saved = rank.layer.forward(**forward, **more)
            rank.layer.backward(dy, saved, out=gradients)
            rank.layer.synchronize()
            return on_host(result).tobytes(), [on_host(array).tobytes() for array in gradients]

        expected = call(lambda array: array)
        step = arrays["topk_ids"].itemsize if name == "topk_ids" else 4
        assert call(lambda array: shifted(array, 16 if wide else step)) == expected
        wrong = [2, 8] if wide and name != "out.w_up" else [4, 8] if wide else [2]
        for nbytes in wrong:
            with pytest.raises(ValueError, match=rf"^{name} must begin at a multiple of"):
                call(lambda array, nbytes=nbytes: shifted(array, nbytes))
        world.barrier()
        assert call(lambda array: array) == expected

    cometrt.spawn(fn, 2, "cuda", timeout_sec=10)


@pytest.mark.parametrize("name", ["out", *(f"out.{name}" for name in OUTPUTS)])
def test_results_go_only_where_they_may(name):
    inputs = make_inputs(CASE)

    def fn(world):
        rank = Rank(world, inputs, CASE.spec, CASE.config)
        y, saved = rank.forward()
        grads = rank.layer.backward(rank.dy, saved)
        rank.layer.synchronize()
        _, saved = rank.forward()

        def call():
            if name == "out":
                return rank.forward(out=Foreign(y))
            field = name.removeprefix("out.")
            out = grads._replace(**{field: Foreign(getattr(grads, field))})
            return rank.layer.backward(rank.dy, saved, out=out)

        with pytest.raises(ValueError, match=rf"^{name} must be writable"):
            call()
        rank.layer.backward(rank.dy, saved, out=grads)
        rank.layer.synchronize()

    cometrt.spawn(fn, 2, "cuda", timeout_sec=10)


@pytest.mark.parametrize("name", [*FORWARD, "dy"])
def test_an_array_of_another_library_is_read_when_its_producer_is_done(name):
    inputs = make_inputs(CASE)

    def fn(world):
        import cupy

        rank = Rank(world, inputs, CASE.spec, CASE.config)
        arrays = dict(
            zip(FORWARD, (rank.x, rank.ids, rank.topk_weights, *rank.weights), strict=True)
        )
        y, saved = rank.layer.forward(**arrays)
        grads = rank.layer.backward(rank.dy, saved)
        rank.layer.synchronize()
        good = on_host(y).tobytes(), on_host(grads.x).tobytes()
        producer, stream = (cupy.cuda.Stream(non_blocking=True) for _ in range(2))
        wanted = rank.dy if name == "dy" else arrays[name]
        late = cupy.zeros_like(wanted)
        pauses = Pauses()
        cupy.cuda.get_current_stream().synchronize()
        world.barrier()
        with producer:
            pauses.pause(50_000)
            late[...] = wanted
        dy = rank.dy
        if name == "dy":
            dy = Foreign(late, producer)
        else:
            arrays[name] = Foreign(late, producer)
        y, saved = rank.layer.forward(**arrays, stream=stream)
        grads = rank.layer.backward(dy, saved, stream=stream)
        rank.layer.synchronize()
        stream.synchronize()
        assert (on_host(y).tobytes(), on_host(grads.x).tobytes()) == good

    cometrt.spawn(fn, 2, "cuda", timeout_sec=10)


def test_memory_of_another_library_outlives_the_call():
    inputs = make_inputs(CASE)

    def fn(world):
        import cupy

        rank = Rank(world, inputs, CASE.spec, CASE.config)
        rank.forward()
        rank.layer.synchronize()
        arrays = rank.x, rank.ids, rank.topk_weights, *rank.weights
        pauses, stream = Pauses(), cupy.cuda.get_current_stream()
        owner = Owner()
        memory = cupy.cuda.UnownedMemory(rank.x.data.ptr, rank.x.nbytes, owner)
        x = cupy.ndarray(rank.x.shape, rank.x.dtype, cupy.cuda.MemoryPointer(memory, 0))
        alive = weakref.ref(owner)
        stream.synchronize()
        world.barrier()
        pauses.pause(200_000)
        y, _ = rank.layer.forward(Foreign(x), *arrays[1:], training=False)
        del owner, memory, x
        assert not stream.done
        assert alive() is not None
        rank.layer.synchronize()
        stream.synchronize()
        rank.layer.forward(Foreign(y), *arrays[1:], training=False)  # what has been used is dropped
        assert alive() is None
        rank.layer.synchronize()

    cometrt.spawn(fn, 2, "cuda", timeout_sec=10)


class Owner:
    """Of memory: it can be referred to weakly."""


def big_layer(world, save):
    """Rows of many bytes: a copy in parallel takes a while."""
    import cupy

    spec = cometrt.MoESpec(2048, 64, num_experts=4, topk=2, max_tokens=512, save=save)
    rng = np.random.default_rng(world.rank)
    bf = lambda *s: cupy.asarray((rng.standard_normal(s) / 16).astype(spec.numpy_dtype))  # noqa: E731
    ids = np.argsort(rng.random((300, 4)), axis=1)[:, :2].astype(np.int32)
    tables = cupy.asarray(ids), cupy.asarray(rng.random((300, 2), np.float32))
    return cometrt.MoELayer(world, spec), bf(300, 2048), tables, (bf(2, 128, 2048), bf(2, 2048, 64))


@pytest.mark.parametrize("save", ["rows", "z", "nothing"])
@pytest.mark.parametrize("shift", [1, 7, 200])
def test_rows_within_the_heap_are_not_overwritten_by_their_own_copy(save, shift):
    def fn(world):
        layer, x, tables, weights = big_layer(world, save)
        y, saved = layer.forward(x, *tables, *weights)
        dy = y.copy()
        grads = layer.backward(dy, saved)
        layer.synchronize()
        for _ in range(5):
            inside = layer.buffer()[shift : shift + 300]
            inside[...] = x
            y2, saved = layer.forward(inside, *tables, *weights)
            inside = layer.buffer()[shift : shift + 300]
            inside[...] = dy
            grads2 = layer.backward(inside, saved)
            layer.synchronize()
            assert y2.get().tobytes() == y.get().tobytes()
            for one, other in zip(grads2, grads, strict=True):
                assert one.get().tobytes() == other.get().tobytes()
            own = layer.buffer()[:300]
            own[...] = x
            y3, _ = layer.forward(own, *tables, *weights, out=own, training=False)
            layer.synchronize()
            assert y3.get().tobytes() == y.get().tobytes()
        with pytest.raises(ValueError, match=r"out must begin where layer.buffer\(\) begins"):
            layer.forward(x, *tables, *weights, out=layer.buffer()[shift : shift + 300])

    cometrt.spawn(fn, 2, "cuda", timeout_sec=10)


def test_a_layer_that_is_dropped_while_its_calls_are_queued():
    inputs = make_inputs(CASE)

    def fn(world):
        import cupy

        rank = Rank(world, inputs, CASE.spec, CASE.config)
        expected, _ = rank.forward()
        rank.layer.synchronize()
        arrays = (rank.x, rank.ids, rank.topk_weights, *rank.weights)
        stream = cupy.cuda.Stream(non_blocking=True)
        gate = Gate()
        world.barrier()
        with stream:
            gate.close()
        y, _ = rank.layer.forward(*arrays, stream=stream, training=False)
        del rank.layer
        # What it gave back would be taken, and written, by these.
        taken = [cupy.full(size, -1, cupy.int8) for size in (512, 4096, 1 << 16, 1 << 20) * 200]
        cupy.cuda.get_current_stream().synchronize()
        world.barrier()
        gate.open()
        stream.synchronize()
        del taken
        assert on_host(y).tobytes() == on_host(expected).tobytes()
        world.barrier()

    cometrt.spawn(fn, 2, "cuda", timeout_sec=10)


def test_saved_fits_a_layer_whose_config_says_only_who_does_what_when():
    inputs = make_inputs(CASE)

    def fn(world):
        import dataclasses

        rank = Rank(world, inputs, CASE.spec, CASE.config, "fused")
        _, saved = rank.forward()
        grads = rank.layer.backward(rank.dy, saved)
        _, saved = rank.forward()
        shape = rank.layer.shape
        for change in (
            {"dispatch_ctas": 1}, {"combine_ctas": 2}, {"raster_group": 2}, {"order": "columns"},
            {"n_chunk": 512}, {"pipeline_chunks": 4}, {"comm_sms": 4},
        ):  # fmt: skip
            config = dataclasses.replace(CASE.config, **change)
            assert dataclasses.replace(shape, config=config).digest == shape.digest
        for change in ({"block_m": 16}, {"block_tokens": 4}, {"num_phases": 1}):
            config = dataclasses.replace(CASE.config, **change)
            assert dataclasses.replace(shape, config=config).digest != shape.digest
        rank.layer.shape = dataclasses.replace(
            shape, config=dataclasses.replace(CASE.config, dispatch_ctas=1, combine_ctas=2)
        )
        again = rank.layer.backward(rank.dy, saved)
        rank.layer.synchronize()
        assert on_host(again.x).tobytes() == on_host(grads.x).tobytes()

    cometrt.spawn(fn, 2, "cuda", timeout_sec=10)
