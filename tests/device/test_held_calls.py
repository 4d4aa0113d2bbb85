"""What is queued behind a call that failed does nothing, on all ranks alike, until its error is
raised; and errors of one rank alone end its peers' waits at once."""

import contextlib
import dataclasses
import time

import numpy as np
import pytest

import cometrt
from tests.cases import Case, check_case, make_inputs, on_device, on_host
from tests.device.pauses import Pauses
from tests.device.test_async import Gate
from tests.device.test_failures import Rank
from tests.host.test_failures import caught

pytestmark = pytest.mark.gpu
CASE = Case((4, 1), mode="fused", gemm="engine")
MODES = ["fused", "sequential", "chunked"]


def dirty_the_pool():
    """What is allocated next, and not cleared, is -1 (or NaN) everywhere."""
    import cupy

    taken = [cupy.full(nbytes, -1, cupy.int8) for nbytes in (512, 4096, 1 << 16, 1 << 22) * 20]
    cupy.cuda.get_current_stream().synchronize()
    del taken


def is_nan(array):
    return np.isnan(on_host(array).astype(np.float32)).all()


def wrong_tables(world, inputs, culprit=1):
    """A rank's ids with one that does not exist."""
    ids = inputs.ids[world.rank].copy()
    if world.rank == culprit:
        ids[3, 1] = CASE.spec.num_experts
    return on_device(world)(ids)


@contextlib.contextmanager
def behind(world, gate):
    """What is called within is queued, and runs afterwards."""
    world.barrier()
    gate.close()
    try:
        yield
    finally:
        world.barrier()
        gate.open()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("fault", ["routing", "capacity"])
def test_what_is_queued_behind_a_failed_call_does_nothing(mode, fault):
    inputs = make_inputs(CASE)
    spec = CASE.spec
    if fault == "capacity":  # room for few rows; a call of one token a rank fits
        spec = dataclasses.replace(spec, capacity_factor=0.01)
    expected = cometrt.RoutingError if fault == "routing" else cometrt.CapacityError
    count = 1 if fault == "capacity" else None

    def fn(world):
        import cupy

        rank = Rank(world, inputs, spec, CASE.config, mode)
        good, gate, pauses = rank.step(count), Gate(), Pauses()
        dirty_the_pool()
        other = cometrt.MoELayer(world, spec, mode, config=CASE.config)  # its first call is inert
        stream = cupy.cuda.get_current_stream()
        shapes = rank.layer.geometry.w_up_shape, rank.layer.geometry.w_down_shape
        totals = [cupy.full(shape, 7, cupy.float32) for shape in shapes]
        out = cometrt.Gradients(None, None, *totals)
        bad = wrong_tables(world, inputs) if fault == "routing" else rank.ids
        fine = (rank.x[:count], rank.ids[:count], rank.topk_weights[:count])
        with behind(world, gate):
            y, saved = rank.layer.forward(rank.x, bad, rank.topk_weights, *rank.weights)
            later = [
                rank.layer.forward(*fine, *rank.weights),
                other.forward(*fine, *rank.weights),
                rank.layer.forward(*fine, *rank.weights, training=False),
            ]
        with pytest.raises(expected):
            other.synchronize()
        rank.layer.synchronize()
        assert is_nan(y)
        assert all(is_nan(result) for result, _ in later)
        # A backward whose forward has failed, before the host knows.
        world.barrier()
        pauses.pause(100_000)
        _, unfinished = rank.layer.forward(rank.x, bad, rank.topk_weights, *rank.weights)
        grads = rank.layer.backward(rank.dy, unfinished)
        with pytest.raises(expected):
            rank.layer.synchronize()
        assert all(is_nan(gradient) for gradient in grads)
        stream.synchronize()
        # Their backwards say so, each on its own, and change no weight gradient.
        for layer, keep, dy in (
            (rank.layer, saved, rank.dy),
            (rank.layer, later[0][1], rank.dy[:count]),
            (other, later[1][1], rank.dy[:count]),
        ):
            grads = layer.backward(dy, keep, out=out, accumulate=True)
            with pytest.raises(
                cometrt.CometError, match=r"backward of layer \d did nothing: its f"
            ):
                layer.synchronize()
            assert is_nan(grads.x)
            assert is_nan(grads.topk_weights)
        assert all((total == 7).all() for total in totals)
        again = rank.step(count)
        assert again.digest() == good.digest()
        return again

    outputs = cometrt.spawn(fn, 4, "cuda", timeout_sec=10)
    if count is None:
        check_case(CASE, inputs, outputs)


@pytest.mark.parametrize("mode", ["fused", "sequential"])
def test_every_layer_of_the_world_raises_it_once_on_each_rank(mode):
    inputs = make_inputs(CASE)

    def fn(world):
        rank = Rank(world, inputs, CASE.spec, CASE.config, mode)
        other = cometrt.MoELayer(world, CASE.spec, mode, config=CASE.config)
        arrays = (rank.x, rank.ids, rank.topk_weights, *rank.weights)
        other.forward(*arrays)
        wrong = (rank.x, wrong_tables(world, inputs), rank.topk_weights)
        rank.layer.forward(*wrong, *rank.weights)
        with pytest.raises(cometrt.RoutingError):
            other.synchronize()  # after the same call on all ranks
        other.synchronize()
        rank.layer.synchronize()
        y, _ = other.forward(*arrays)
        other.synchronize()
        assert np.isfinite(on_host(y).astype(np.float32)).all()

    cometrt.spawn(fn, 4, "cuda", timeout_sec=10)


def test_a_backward_that_did_nothing_was_the_one_of_its_forward():
    inputs = make_inputs(CASE)

    def fn(world):
        rank = Rank(world, inputs, CASE.spec, CASE.config, "fused")
        _, saved = rank.forward()
        rank.layer.synchronize()
        world.barrier()
        Pauses().pause(100_000)
        wrong = (rank.x, wrong_tables(world, inputs), rank.topk_weights)
        rank.layer.forward(*wrong, *rank.weights)
        grads = rank.layer.backward(rank.dy, saved)
        with pytest.raises(cometrt.RoutingError):
            rank.layer.synchronize()
        assert all(is_nan(gradient) for gradient in grads)
        with pytest.raises(ValueError, match="saved must be used for one backward only"):
            rank.layer.backward(rank.dy, saved)
        return rank.step()

    check_case(CASE, inputs, cometrt.spawn(fn, 4, "cuda", timeout_sec=10))


def test_the_first_call_of_a_layer_fails():
    inputs = make_inputs(CASE)

    def fn(world):
        for mode in MODES:
            dirty_the_pool()
            rank = Rank(world, inputs, CASE.spec, CASE.config, mode)
            y, _ = rank.layer.forward(
                rank.x, wrong_tables(world, inputs), rank.topk_weights, *rank.weights
            )
            with pytest.raises(cometrt.RoutingError):
                rank.layer.synchronize()
            assert is_nan(y)
            output = rank.step()
        return output

    check_case(CASE, inputs, cometrt.spawn(fn, 4, "cuda", timeout_sec=10))


def test_an_error_behind_one_that_was_not_read_is_not_lost():
    inputs = make_inputs(CASE)

    def fn(world):
        import cupy

        rank = Rank(world, inputs, CASE.spec, CASE.config, "fused")
        stream, y = cupy.cuda.get_current_stream(), cupy.empty_like(rank.x)

        def captured():
            world.barrier()
            stream.begin_capture()
            rank.forward(training=False, out=y)
            graph = stream.end_capture()
            graph.upload(stream)
            stream.synchronize()
            world.barrier()
            return graph

        rank.forward(training=False, out=y)
        rank.layer.synchronize()
        stale = captured()
        world.reset()
        graph, good = captured(), rank.ids.copy()
        stale.launch(stream)
        rank.ids[...] = wrong_tables(world, inputs)
        graph.launch(stream)
        stream.synchronize()
        found = [str(caught(rank.layer.synchronize)) for _ in range(3)]
        assert sum("captured before world.reset()" in text for text in found) == 1, found
        assert sum("must be in [-1, " in text for text in found) == 1, found
        rank.ids[...] = good
        world.barrier()
        graph.launch(stream)
        stream.synchronize()
        rank.layer.synchronize()
        assert np.isfinite(on_host(y).astype(np.float32)).all()

    cometrt.spawn(fn, 4, "cuda", timeout_sec=10)


def test_a_late_abort_of_an_old_generation_hides_no_newer_one():
    inputs = make_inputs(CASE)

    def fn(world):
        import cupy

        from cometrt.world.layout import device_control_block_dtype

        rank = Rank(world, inputs, CASE.spec, CASE.config, "fused")
        rank.step()
        for _ in range(3):
            world.reset()
        address = world.gpu.control[world.rank] + device_control_block_dtype.fields["abort"][1]
        memory = cupy.cuda.UnownedMemory(address, 8 * 64, world)
        aborts = cupy.ndarray((64,), cupy.uint64, cupy.cuda.MemoryPointer(memory, 0))
        aborts[:4] = world.generation - 1  # late ones of the last generation stop nothing
        output = rank.step()
        world.barrier()
        aborts[2] = world.generation  # rank 2 stops the world, and then others' late ones come
        aborts[:2] = world.generation - 1
        aborts[3] = 1
        cupy.cuda.get_current_stream().synchronize()
        world.barrier()
        y, _ = rank.forward()
        cupy.cuda.get_current_stream().synchronize()
        assert is_nan(y)
        world.barrier()
        aborts[:] = 0
        return output

    check_case(CASE, inputs, cometrt.spawn(fn, 4, "cuda", timeout_sec=10))


def test_replays_behind_a_failed_call_do_nothing():
    inputs = make_inputs(CASE)

    def fn(world):
        import cupy

        rank = Rank(world, inputs, CASE.spec, CASE.config, "fused")
        stream = cupy.cuda.get_current_stream()
        y = cupy.empty_like(rank.x)
        ids = rank.ids.copy()

        def forward():
            tables = (rank.x, ids, rank.topk_weights, *rank.weights)
            rank.layer.forward(*tables, training=False, out=y)

        forward()
        rank.layer.synchronize()
        good = on_host(y)
        y.fill(1)  # its kernel is loaded now: loading may wait for kernels that wait for a peer
        stream.synchronize()
        world.barrier()
        stream.begin_capture()
        forward()
        graph = stream.end_capture()
        graph.upload(stream)
        stream.synchronize()
        world.barrier()
        gate, wrong = Gate(), wrong_tables(world, inputs)
        with behind(world, gate):
            ids[...] = wrong
            graph.launch(stream)
            ids[...] = rank.ids
            y.fill(1)
            graph.launch(stream)  # right again, and does nothing
            graph.launch(stream)
        stream.synchronize()
        assert is_nan(y)
        with pytest.raises(cometrt.RoutingError):
            rank.layer.synchronize()
        world.barrier()
        graph.launch(stream)
        stream.synchronize()
        rank.layer.synchronize()
        assert on_host(y).tobytes() == good.tobytes()

    cometrt.spawn(fn, 4, "cuda", timeout_sec=10)


def test_a_graph_of_an_older_generation_does_nothing_also_where_nothing_stopped_the_world():
    inputs = make_inputs(CASE)

    def fn(world):
        import cupy

        rank = Rank(world, inputs, CASE.spec, CASE.config, "fused")
        stream, y = cupy.cuda.get_current_stream(), cupy.empty_like(rank.x)
        rank.forward(training=False, out=y)
        rank.layer.synchronize()
        world.barrier()
        stream.begin_capture()
        rank.forward(training=False, out=y)
        graph = stream.end_capture()
        graph.upload(stream)
        stream.synchronize()
        world.barrier()
        world.reset()
        graph.launch(stream)
        stream.synchronize()
        assert is_nan(y)
        with pytest.raises(cometrt.CometError, match=r"captured before world.reset\(\)"):
            rank.layer.synchronize()
        world.barrier()
        return rank.step()

    check_case(CASE, inputs, cometrt.spawn(fn, 4, "cuda", timeout_sec=10))


def _no_launch(*_, **__):
    raise cometrt.CometError("no launch: CUDA error 1")


def _no_memory(*_, **__):
    raise MemoryError("out of memory")


class NoMemory(dict):
    __getitem__ = _no_memory


BREAKS = {  # what fails on one rank, in which mode, before or after others are in the call
    "launch": ("fused", lambda ex: ex.kernels.update(dispatch_gemm=_no_launch)),
    "publish": ("sequential", lambda ex: ex.kernels.update(publish=_no_launch)),
    "finish": ("fused", lambda ex: ex.kernels.update(finish=_no_launch)),
    "tensor map": ("sequential", lambda ex: ex.kernels.update(up=_no_launch)),
    "memory": ("fused", lambda ex: setattr(ex, "forward_arrays", NoMemory())),
    "results": ("fused", None),
}  # fmt: skip


@pytest.mark.parametrize("what", BREAKS)
def test_an_error_of_one_rank_ends_the_others_at_once(what):
    inputs = make_inputs(CASE)
    mode, break_it = BREAKS[what]

    def fn(world):
        rank = Rank(world, inputs, CASE.spec, CASE.config, mode)
        rank.layer.executor.graphs.enabled = False
        if world.rank == 2 and break_it:
            break_it(rank.layer.executor)
        elif world.rank == 2:
            vars(rank.layer)["_arrays"].empty = _no_memory
        error = caught(rank.forward) or caught(rank.layer.synchronize)
        if world.rank == 2:
            kind = MemoryError if what in ("memory", "results") else cometrt.CometError
            assert isinstance(error, kind)
        else:
            assert isinstance(error, cometrt.PeerTimeout), error
            assert "rank 2 raised" in str(error)
        world.reset()
        return Rank(world, inputs, CASE.spec, CASE.config, mode).step()

    begin = time.monotonic()
    check_case(CASE, inputs, cometrt.spawn(fn, 4, "cuda", timeout_sec=30))
    assert time.monotonic() - begin < 20


def test_a_backward_that_times_out_says_what_is_unspecified():
    inputs = make_inputs(CASE)

    def fn(world):
        import cupy

        rank = Rank(world, inputs, CASE.spec, CASE.config, "fused")
        _, saved = rank.forward()
        rank.layer.synchronize()
        if world.rank == 1:
            rank.layer.executor.kernels["up_dgrad_combine_wgrad"] = lambda *_: None
        shapes = rank.layer.geometry.w_up_shape, rank.layer.geometry.w_down_shape
        totals = [cupy.zeros(shape, cupy.float32) for shape in shapes]
        world.timeout_sec = 1.0
        out = cometrt.Gradients(None, None, *totals)
        grads = rank.layer.backward(rank.dy, saved, out=out, accumulate=True)
        error = caught(rank.layer.synchronize)
        if world.rank != 1:
            assert isinstance(error, cometrt.PeerTimeout)
            assert "weight gradients of this backward are unspecified" in str(error)
            assert is_nan(grads.x)
        world.timeout_sec = 10.0
        world.reset()
        return Rank(world, inputs, CASE.spec, CASE.config, "fused").step()

    check_case(CASE, inputs, cometrt.spawn(fn, 4, "cuda", timeout_sec=10))
