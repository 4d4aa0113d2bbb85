"""Failures on CUDA: each raises when the host next looks, and the layer or world goes on."""

import dataclasses
import time

import numpy as np
import pytest

import cometrt
from tests.cases import Case, Output, check_case, make_inputs, on_device, on_host
from tests.host.test_failures import caught

pytestmark = pytest.mark.gpu
CASE = Case((4, 1), mode="sequential", gemm="engine")


class Rank:
    """One rank's layer and device arrays; `step` is a forward and a backward."""

    def __init__(self, world, inputs, spec=CASE.spec, config=CASE.config, mode=None):
        move, r = on_device(world), world.rank
        self.world = world
        self.weights = [
            move(w) for w in cometrt.shard_weights(inputs.w_up, inputs.w_down, r, world.size, spec)
        ]
        self.x, self.dy = move(inputs.x[r]), move(inputs.dy[r])
        self.ids, self.topk_weights = move(inputs.ids[r]), move(inputs.weights[r])
        self.layer = cometrt.MoELayer(world, spec, mode, config=config)

    def forward(self, count=None, **more):
        inputs = (self.x[:count], self.ids[:count], self.topk_weights[:count])
        return self.layer.forward(*inputs, *self.weights, **more)

    def step(self, count=None):
        y, saved = self.forward(count)
        grads = self.layer.backward(self.dy[:count], saved)
        self.layer.synchronize()
        return Output(on_host(y), cometrt.Gradients(*map(on_host, grads)))


@pytest.mark.parametrize(
    ("token", "value", "message"),
    [(4, 16, r"token 4, k 2 must be in \[-1, 16\) \(got 16\)"), (6, None, "token 6, k 2 must be")],
)
def test_wrong_routing_is_told_later_and_the_layer_goes_on(token, value, message):
    inputs = make_inputs(CASE)
    good = inputs.ids[1].copy()
    inputs.ids[1][token, 2] = inputs.ids[1][token, 0] if value is None else value

    def fn(world):
        rank = Rank(world, inputs)
        y, _ = rank.forward()  # nothing is raised yet
        with pytest.raises(cometrt.RoutingError, match=message):
            rank.layer.synchronize()
        assert np.isnan(on_host(y).astype(np.float32)).all()
        rank.layer.synchronize()
        if world.rank == 1:
            rank.ids = on_device(world)(good)
        return rank.step()

    outputs = cometrt.spawn(fn, 4, "cuda", timeout_sec=10)
    inputs.ids[1] = good
    check_case(CASE, inputs, outputs)


@pytest.mark.parametrize("gemm", ["engine", "cublas"])
def test_too_many_rows_are_told_by_the_next_call(gemm):
    import cupy

    inputs = make_inputs(CASE)
    config = dataclasses.replace(CASE, gemm=gemm).config
    # Room for three tiles of 128 or 16 rows, or not many more; each rank has four experts.
    spec = dataclasses.replace(CASE.spec, capacity_factor=0.01)

    def fn(world):
        mode = "fused" if gemm == "engine" else "sequential"
        rank = Rank(world, inputs, spec, config, mode)
        y, _ = rank.forward()
        kept = rank.x.copy()
        cupy.cuda.get_current_stream().synchronize()  # the device has come so far
        with pytest.raises(cometrt.CapacityError, match="capacity_factor"):
            rank.forward(out=kept)
        assert np.isnan(on_host(y).astype(np.float32)).all()
        assert np.array_equal(on_host(kept), on_host(rank.x))  # the second call has not happened
        return rank.step(1)

    outputs = cometrt.spawn(fn, 4, "cuda", timeout_sec=10)
    for part in (inputs.x, inputs.dy, inputs.ids, inputs.weights):
        part[:] = [array[:1] for array in part]
    check_case(CASE, inputs, outputs)


def test_a_mismatch_stops_the_world_until_reset():
    inputs = make_inputs(CASE)

    def fn(world):
        rank = Rank(world, inputs)
        _, saved = rank.forward()
        if world.rank == 2:
            rank.layer.backward(rank.dy, saved)
        else:
            rank.forward()
        with pytest.raises(cometrt.MismatchError, match="rank 2: backward of layer 0"):
            rank.layer.synchronize()
        assert isinstance(caught(rank.forward), cometrt.MismatchError)
        world.reset()
        return rank.step()

    check_case(CASE, inputs, cometrt.spawn(fn, 4, "cuda", timeout_sec=10))


def test_an_absent_rank_gives_a_timeout_and_the_process_goes_on():
    inputs = make_inputs(CASE)

    def fn(world):
        rank = Rank(world, inputs)
        world.timeout_sec = 1.0
        if world.rank == 3:
            time.sleep(2.5)
        else:
            error = caught(rank.forward)  # hosts of ranks that share a GPU meet
            assert isinstance(error, cometrt.PeerTimeout)
            assert error.peer == 3
        world.timeout_sec = 10.0
        world.reset()
        return rank.step()

    check_case(CASE, inputs, cometrt.spawn(fn, 4, "cuda", timeout_sec=10))


@pytest.mark.parametrize("mode", ["fused", "sequential"])
def test_a_flag_that_never_comes_is_told_by_the_device(mode):
    # A rank's push is lost: the home's kernel waits, gives up, and says what it waited for.
    inputs = make_inputs(CASE)

    def fn(world):
        rank = Rank(world, inputs, mode=mode)
        kernels = rank.layer.executor.kernels
        if world.rank == 1 and mode == "fused":
            kernels["gemm_combine"] = lambda *_: None
        elif world.rank == 1:
            kernels["push"] = lambda *_: None
        rank.world.timeout_sec = 1.0
        y, _ = rank.forward()
        error = caught(rank.layer.synchronize)
        if world.rank != 1:  # which has all it needs, and may have ended before
            assert isinstance(error, cometrt.PeerTimeout)
            assert (error.flag, error.peer, error.epoch) == ("partials_ready", 1, 1)
            assert error.tile >= 0
            assert np.isnan(on_host(y).astype(np.float32)).all()
        world.timeout_sec = 10.0
        world.reset()
        layer = Rank(world, inputs)
        return layer.step()

    check_case(CASE, inputs, cometrt.spawn(fn, 4, "cuda", timeout_sec=10))


@pytest.mark.parametrize("mode", ["fused", "sequential"])
def test_a_rank_that_raises_in_the_middle_ends_the_others_at_once(mode):
    inputs = make_inputs(CASE)

    def fail(*_):
        raise LookupError("mine")

    def fn(world):
        rank = Rank(world, inputs, mode=mode)
        if world.rank == 2 and mode == "fused":
            rank.layer.executor.kernels["dispatch_gemm"] = fail
        elif world.rank == 2:
            rank.layer.executor.kernels["dispatch"] = fail
        error = caught(rank.forward) or caught(rank.layer.synchronize)
        if world.rank == 2:
            assert isinstance(error, LookupError)
        else:
            assert isinstance(error, cometrt.PeerTimeout)
            assert "rank 2 raised LookupError in a forward of layer 0: mine" in str(error)
        world.reset()
        return Rank(world, inputs).step()

    begin = time.monotonic()
    check_case(CASE, inputs, cometrt.spawn(fn, 4, "cuda", timeout_sec=30))
    assert time.monotonic() - begin < 20


def test_the_engine_wants_its_block_m():
    def fn(world):
        with pytest.raises(ValueError, match=r"block_m must be 128 on device='cuda' .*got 64"):
            cometrt.MoELayer(world, CASE.spec, config=cometrt.TileConfig(block_m=64))

    cometrt.spawn(fn, 2, "cuda")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: {"x": on_host(r.x)}, "x must be a CuPy or DLPack array on device='cuda'"),
        (lambda r: {"x": r.x[:, :32]}, r"x must have shape \(T, 48\)"),
        (lambda r: {"topk_weights": r.topk_weights[::-1]}, "topk_weights must be C-contiguous"),
        (lambda r: {"stream": 7}, "stream must have __cuda_stream__"),
    ],
)
def test_wrong_arguments(change, message):
    inputs = make_inputs(Case((1, 1)))

    def fn(world):
        rank = Rank(world, inputs, Case((1, 1)).spec)
        good = {
            "x": rank.x,
            "topk_ids": rank.ids,
            "topk_weights": rank.topk_weights,
            "w_up": rank.weights[0],
            "w_down": rank.weights[1],
        }
        with pytest.raises(ValueError, match=message):
            rank.layer.forward(**(good | change(rank)))

    cometrt.spawn(fn, 1, "cuda")


def test_a_thousand_calls_leak_no_memory():
    import cupy

    inputs = make_inputs(CASE)
    used = {}

    def fn(world):
        rank = Rank(world, inputs)
        for call in range(1000):
            rank.forward()
            if call in (50, 999):
                rank.layer.synchronize()
                world.barrier()
                free, _ = cupy.cuda.runtime.memGetInfo()
                used[call, world.rank] = free
        rank.layer.synchronize()

    cometrt.spawn(fn, 4, "cuda", timeout_sec=20)
    for rank in range(4):
        assert used[50, rank] - used[999, rank] < 32 << 20
