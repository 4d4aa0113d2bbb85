"""Ranks on GPUs of their own, which reach each other's memory: as threads, and under mpirun.

With fewer than two GPUs these tests are skipped, unless COMETRT_TEST_RANKS says how many ranks
there shall be: they share the GPU then.
"""

import itertools
import os
import time

import numpy as np
import pytest

import cometrt
from tests.cases import (
    ACTIVATIONS,
    ROUTINGS,
    Case,
    Output,
    check_case,
    make_inputs,
    on_device,
    on_host,
    spawn_case,
)
from tests.device.test_failures import Rank
from tests.device.test_orders import Rank as OrdersRank
from tests.host.test_failures import caught
from tests.host.test_orders import batches_of
from tests.launch import mpirun


def num_gpus() -> int:
    try:
        import cupy

        return cupy.cuda.runtime.getDeviceCount()
    except Exception:  # no CuPy, or no driver
        return 0


GPUS = num_gpus()
RANKS = int(os.environ.get("COMETRT_TEST_RANKS", GPUS))
LAST = RANKS - 1
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(RANKS < 2, reason="needs two GPUs")]

TP = sorted({tp for tp in (1, 2, 4, RANKS) if RANKS and RANKS % tp == 0})
_TURNS = itertools.cycle(
    itertools.product(
        ACTIVATIONS, [16, 48, 80], ["rows", "z", "nothing"], ["phases", "columns"], [0, 1]
    )
)
CASES = [
    Case((RANKS, tp), routing, activation, "bfloat16", columns, save, order, mode, seed, gemm)
    for (tp, (index, routing), mode), (activation, columns, save, order, seed) in zip(
        itertools.product(TP, enumerate(ROUTINGS), ["fused", "sequential"]), _TURNS, strict=False
    )
    for gemm in ["engine" if mode == "fused" or index % 2 else "cublas"]
]


@pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")
def test_each_rank_has_a_gpu_of_its_own_also_the_second_time():
    def fn(world):
        import cupy

        return cupy.cuda.Device().id, world.shares_gpu

    for ranks in (GPUS, GPUS, 2):
        assert cometrt.spawn(fn, ranks, "cuda") == [(rank, False) for rank in range(ranks)]
    # A modelled link lies between partitions of one.
    assert cometrt.spawn(fn, 2, "cuda", link="h100") == [(0, True)] * 2


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_reference(case):
    spawn_case(case, device="cuda")


@pytest.mark.parametrize("tp", TP)
def test_fused_has_the_bits_of_sequential(tp):
    # Rows of several copy chunks of 4 KB, experts of several tiles, several token blocks.
    spec = cometrt.MoESpec(
        hidden=4096, intermediate=256 * tp, num_experts=4 * RANKS, topk=4, max_tokens=1500, tp=tp
    )
    rng, hidden, dtype = np.random.default_rng(0), spec.hidden, spec.numpy_dtype
    shapes = (2 * spec.intermediate, hidden), (hidden, spec.intermediate)
    model = [
        (rng.standard_normal((spec.num_experts, *shape), np.float32) / 50).astype(dtype)
        for shape in shapes
    ]

    def fn(world):
        move, mine = on_device(world), np.random.default_rng(1 + world.rank)
        weights = [move(w) for w in cometrt.shard_weights(*model, world.rank, RANKS, spec)]
        layers = [
            cometrt.MoELayer(world, spec, mode, config=cometrt.TileConfig(order=order))
            for mode, order in (
                ("sequential", "phases"), ("fused", "phases"), ("fused", "columns"),
            )
        ]  # fmt: skip
        for tokens in (1500, 1, 700, 0 if world.rank == LAST else 1024):
            x = mine.standard_normal((tokens, hidden), np.float32).astype(dtype)
            scores = mine.random((tokens, spec.num_experts))
            ids = np.argsort(scores, axis=1)[:, :4].astype(np.int32)
            tables = move(x), move(ids), move(mine.random((tokens, 4), np.float32))
            expected, *others = [
                on_host(layer.forward(*tables, *weights, training=False)[0]) for layer in layers
            ]
            assert np.isfinite(expected.astype(np.float32)).all()
            for other in others:
                assert other.tobytes() == expected.tobytes(), tokens
        for layer in layers:
            layer.close()

    cometrt.spawn(fn, RANKS, "cuda", timeout_sec=10)


_HOLD = r"""
extern "C" __global__ void hold(unsigned long long nanoseconds) {
  unsigned long long begin, now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(begin));
  do { asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now)); } while (now - begin < nanoseconds);
}
"""


def held_up(launch):
    """The same, a few milliseconds later on the device."""
    import cupy

    hold = cupy.RawKernel(_HOLD, "hold")
    hold((1,), (1,), (np.uint64(0),))  # loaded now

    def late(*args):
        hold((1,), (1,), (np.uint64(3_000_000),))
        launch(*args)

    return late


@pytest.mark.parametrize("slow_rank", [0, LAST])
@pytest.mark.parametrize("mode", ["fused", "sequential"])
@pytest.mark.parametrize("where", ["publish", "in the middle"])
def test_calls_in_a_row_with_a_slow_rank(mode, where, slow_rank):
    case = Case((RANKS, 1), mode=mode, gemm="engine")
    batches = batches_of(case, 6, ("uniform", "at_home", "skewed"))

    def fn(world):
        rank = OrdersRank(world, case, batches, 0.0)
        kernels, name = rank.layer.executor.kernels, "publish"
        if where != "publish":
            name = "gemm_combine" if mode == "fused" else "push"
        if world.rank == slow_rank:
            kernels[name] = held_up(kernels[name])
        world.barrier()
        for batch in range(6):
            rank.forward(batch)
        grads = {batch: rank.backward(batch) for batch in (0, 2, 1, 5, 4, 3)}
        rank.layer.synchronize()
        return {
            b: Output(on_host(rank.y[b]), cometrt.Gradients(*map(on_host, g)))
            for b, g in grads.items()
        }

    results = cometrt.spawn(fn, RANKS, "cuda", timeout_sec=10)
    for batch in results[0]:
        check_case(case, batches[batch], [outputs[batch] for outputs in results])


CASE = Case((RANKS, 1), mode="sequential", gemm="engine")


def lose(rank, mode):
    """What this rank sends home never leaves."""
    kernels = rank.layer.executor.kernels
    if mode == "fused":
        kernels["gemm_combine"] = lambda *_: None
    else:
        kernels["push"] = lambda *_: None


@pytest.mark.parametrize("mode", ["fused", "sequential"])
def test_a_stalled_rank_is_told_by_the_others_devices_and_reset_helps(mode):
    inputs = make_inputs(CASE)

    def fn(world):
        rank = Rank(world, inputs, CASE.spec, CASE.config, mode)
        if world.rank == LAST:
            lose(rank, mode)
        world.timeout_sec = 1.0
        y, _ = rank.forward()
        error = caught(rank.layer.synchronize)
        if world.rank != LAST:  # which has all it needs, and may have ended before
            assert isinstance(error, cometrt.PeerTimeout)
            assert (error.flag, error.epoch) == ("partials_ready", 1)
            assert error.peer == LAST
            assert np.isnan(on_host(y).astype(np.float32)).all()
        world.timeout_sec = 10.0
        world.reset()
        return Rank(world, inputs, CASE.spec, CASE.config, mode).step()

    check_case(CASE, inputs, cometrt.spawn(fn, RANKS, "cuda", timeout_sec=10))


@pytest.mark.parametrize("mode", ["fused", "sequential"])
def test_a_rank_that_raises_in_the_middle_ends_the_others_at_once(mode):
    inputs = make_inputs(CASE)

    def fail(*_):
        raise LookupError("mine")

    def fn(world):
        rank = Rank(world, inputs, CASE.spec, CASE.config, mode)
        kernels = rank.layer.executor.kernels
        if world.rank == LAST and mode == "fused":
            kernels["dispatch_gemm"] = fail
        elif world.rank == LAST:
            kernels["dispatch"] = fail
        error = caught(rank.forward) or caught(rank.layer.synchronize)
        expected = LookupError if world.rank == LAST else cometrt.PeerTimeout
        assert isinstance(error, expected), repr(error)
        world.reset()
        return Rank(world, inputs, CASE.spec, CASE.config, mode).step()

    begin = time.monotonic()
    check_case(CASE, inputs, cometrt.spawn(fn, RANKS, "cuda", timeout_sec=30))
    assert time.monotonic() - begin < 20


def test_a_mismatch_stops_the_world_until_reset():
    inputs = make_inputs(CASE)

    def fn(world):
        rank = Rank(world, inputs, CASE.spec, CASE.config)
        _, saved = rank.forward()
        if world.rank == LAST:
            rank.layer.backward(rank.dy, saved)
        else:
            rank.forward()
        with pytest.raises(cometrt.MismatchError, match=f"rank {LAST}: backward of layer 0"):
            rank.layer.synchronize()
        world.reset()
        return rank.step()

    check_case(CASE, inputs, cometrt.spawn(fn, RANKS, "cuda", timeout_sec=10))


@pytest.fixture
def launcher(monkeypatch):
    monkeypatch.setenv("OMPI_ALLOW_RUN_AS_ROOT", "1")
    monkeypatch.setenv("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")


@pytest.mark.usefixtures("launcher")
def test_cases_under_mpirun():
    result = mpirun(RANKS, "-m", "tests.multi.run_cuda_cases", timeout_sec=120)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
    assert f"all cases passed on {min(GPUS, RANKS)} GPUs" in result.stdout


@pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")
@pytest.mark.usefixtures("launcher")
def test_steps_beside_an_all_reduce_of_another_stream():
    result = mpirun(GPUS, "tests/multi/nccl_beside.py", "100", timeout_sec=100)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
    assert f"100 steps on {GPUS} GPUs" in result.stdout


@pytest.mark.usefixtures("launcher")
@pytest.mark.parametrize("tp", TP)
def test_a_model_under_mpirun(tp):
    options = ["--model", "qwen3-30b-a3b", "--scale", "4", "--tokens", "512", "--tp", str(tp)]
    command = ["-m", "mpi4py", "examples/moe_layer.py", *options, "--device", "cuda"]
    result = mpirun(RANKS, *command, timeout_sec=100)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "checked: y " in result.stdout
