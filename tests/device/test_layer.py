"""The layer on CUDA against the float64 reference, on virtual ranks of one GPU."""

import dataclasses
import itertools

import pytest

import cometrt
from tests.cases import (
    ACTIVATIONS,
    RANKS,
    ROUTINGS,
    Case,
    make_inputs,
    on_device,
    on_host,
    spawn_case,
)

pytestmark = pytest.mark.gpu

_TURNS = itertools.cycle(
    itertools.product(
        ACTIVATIONS, [16, 48, 80], ["rows", "z", "nothing"], ["phases", "columns"], [0, 1]
    )
)
CASES = [
    Case(ranks, routing, activation, "bfloat16", columns, save, order, "sequential", seed)
    for (ranks, routing), (activation, columns, save, order, seed) in zip(
        itertools.product(RANKS, ROUTINGS), _TURNS, strict=False
    )
]


CASES = [dataclasses.replace(case, gemm="engine", mode="fused") for case in CASES] + [
    dataclasses.replace(case, gemm=gemm, mode=mode)
    for case, (gemm, mode) in itertools.product(
        CASES, [("engine", "sequential"), ("cublas", "sequential"), ("engine", "chunked")]
    )
    if case.routing in ("uniform", "skewed", "one_expert")
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_reference(case):
    spawn_case(case, device="cuda")


@pytest.mark.parametrize("mode", ["sequential", "fused", "chunked"])
@pytest.mark.parametrize("tp", [1, 2])
def test_inference_has_the_bits_of_training(tp, mode):
    # Without z the engine runs another kernel; with routing the host cannot know in time.
    case = Case((4, tp), "skewed", mode=mode, gemm="engine")
    inputs = make_inputs(case)

    def fn(world):
        r, move = world.rank, on_device(world)
        weights = cometrt.shard_weights(inputs.w_up, inputs.w_down, r, 4, case.spec)
        tables = [move(part[r]) for part in (inputs.x, inputs.ids, inputs.weights)]
        with cometrt.MoELayer(world, case.spec, mode, config=case.config) as layer:
            args = (*tables, *map(move, weights))
            (trained, saved), (inferred, none) = (
                layer.forward(*args, training=training) for training in (True, False)
            )
        assert saved is not None
        assert none is None
        assert on_host(trained).tobytes() == on_host(inferred).tobytes()

    cometrt.spawn(fn, 4, "cuda", timeout_sec=10)


@pytest.mark.parametrize("save", ["rows", "z", "nothing"])
@pytest.mark.parametrize("ranks", [(1, 1), (4, 1), (4, 2)], ids=str)
def test_planned_by_a_grid(ranks, save, monkeypatch):
    """Layers of these tests are small: one cluster plans them, unless told otherwise."""
    monkeypatch.setattr("cometrt.cuda.planner._SMALL_PAIRS", 0)
    spawn_case(Case(ranks, "skewed", save=save, mode="fused", gemm="engine"), device="cuda")


@pytest.mark.parametrize("by_grid", [False, True], ids=["cluster", "grid"])
@pytest.mark.parametrize("save", ["rows", "z", "nothing"])
def test_padding_rows_may_hold_anything(save, by_grid, monkeypatch):
    if by_grid:
        monkeypatch.setattr("cometrt.cuda.planner._SMALL_PAIRS", 0)
    case = Case((4, 1), "skewed", save=save, mode="fused", gemm="engine")
    inputs = make_inputs(case)

    def fn(world):
        import cupy

        r, move = world.rank, on_device(world)
        weights = cometrt.shard_weights(inputs.w_up, inputs.w_down, r, 4, case.spec)
        tables = [move(part[r]) for part in (inputs.x, inputs.ids, inputs.weights)]
        args, dy = (*tables, *map(move, weights)), move(inputs.dy[r])
        with cometrt.MoELayer(world, case.spec, "fused", config=case.config) as layer:

            def results(value):
                """Of calls whose arrays are taken from memory full of that value."""
                for training in (False, True):
                    memory = cupy.full(1 << 22, value, case.spec.numpy_dtype)
                    cupy.cuda.get_current_stream().synchronize()
                    del memory
                    world.barrier()  # no rank allocates while another one's call waits for it
                    y, saved = layer.forward(*args, training=training)
                    found = [y] if saved is None else [y, *layer.backward(dy, saved)]
                    layer.synchronize()
                    world.barrier()
                    yield [on_host(array).tobytes() for array in found]

            assert list(results(float("nan"))) == list(results(0))

    cometrt.spawn(fn, 4, "cuda", timeout_sec=10)
