"""The device planner's tables against the NumPy planner's, bit for bit."""

import dataclasses

import numpy as np
import pytest

import cometrt
from cometrt.bench.workloads import Cell
from cometrt.cuda.planner import fits_in_shared
from cometrt.plan import PlanShape, TileConfig
from cometrt.plan.reference import make_plan
from cometrt.plan.routing import RoutingTables
from cometrt.specs import Geometry, MoESpec

cp = pytest.importorskip("cupy")
pytestmark = pytest.mark.gpu


def random_case(seed):
    """(spec, config, size, tables) with anything from one rank to 3 x 4, adversarial too."""
    rng = np.random.default_rng(seed)
    tp, ep = int(rng.integers(1, 4)), int(rng.integers(1, 6))
    num_experts = ep * int(rng.integers(1, 5))
    topk = int(rng.integers(1, min(num_experts, 8) + 1))
    max_tokens = int(rng.choice([1, 24, 128, 300]))
    spec = MoESpec(
        16, 16 * tp, num_experts, topk, max_tokens, tp=tp, capacity_factor=float(10 * ep)
    )
    config = TileConfig(
        block_m=int(rng.choice([1, 16, 64, 128, 256])),
        block_tokens=int(rng.choice([1, 8, 64])),
        min_token_blocks=int(rng.choice([1, 30, 256])),
        num_phases=int(rng.choice([1, 2, 3, 4, 99])),
    )
    size = ep * tp
    num_tokens = rng.integers(0, max_tokens + 1, size) * (rng.random(size) < 0.85)
    noisy = rng.normal(scale=rng.choice([0.0, 3.0]), size=num_experts) + rng.gumbel(
        size=(size, max_tokens, num_experts)
    )
    ids = np.argsort(-noisy, axis=2)[:, :, :topk].astype(np.int32)
    ids[rng.random(ids.shape) < rng.choice([0.0, 0.3, 1.0], p=[0.5, 0.4, 0.1])] = -1
    weights = rng.uniform(0.5, 1.5, ids.shape).astype(np.float32)
    return spec, config, size, RoutingTables(ids, weights, num_tokens.astype(np.int32))


def device_plan(tables, shape, small=None):
    from cometrt.cuda.planner import DevicePlanner, planner_counters

    counters = cp.zeros(planner_counters(shape), cp.uint32)
    planner = DevicePlanner(shape, counters, small=small)
    arrays = map(cp.asarray, (tables.ids, tables.weights, tables.num_tokens))
    return planner, planner.plan(*arrays)


def assert_equal(plan, expected):
    for field in dataclasses.fields(expected):
        np.testing.assert_array_equal(
            cp.asnumpy(getattr(plan, field.name)), getattr(expected, field.name), field.name
        )


@pytest.mark.parametrize("small", [False, True], ids=["grid", "one block"])
@pytest.mark.parametrize("seed", range(150))
def test_random_routings(seed, small):
    spec, config, size, tables = random_case(seed)
    for rank in {0, size // 2, size - 1}:
        shape = PlanShape(Geometry(spec, rank, size), config)
        if small and not fits_in_shared(shape):
            pytest.skip("one block's shared memory does not hold the tables")
        planner, plan = device_plan(tables, shape, small)
        assert planner.wrong_pair() is None
        assert planner.largest_need() is None
        assert_equal(plan, make_plan(tables, shape))


@pytest.mark.parametrize("seed", range(40))
def test_where_a_blocks_last_tile_is(seed):
    spec, config, size, tables = random_case(seed)
    shape = PlanShape(Geometry(spec, size - 1, size), config)
    planner, _ = device_plan(tables, shape)
    plan = make_plan(tables, shape)
    first_needed = {
        int(token): position
        for position in range(int(plan.num_tiles[0]))
        for token in plan.pulls_of(position)
    }
    expected = np.full(size * shape.blocks_per_home, -1)
    for home, block, tokens in plan.pushes(shape):
        last = min(first_needed[int(token)] for token in tokens)  # the down GEMM walks backwards
        expected[home * shape.blocks_per_home + block] = last
    found = planner.scratch["block_order_idx"].get()
    assert planner.block_order_idx == planner.scratch["block_order_idx"].data.ptr
    np.testing.assert_array_equal(found, expected)
    in_order = expected[plan.push_blocks[: plan.num_blocks[0]]]
    assert (np.diff(in_order) <= 0).all()


@pytest.mark.parametrize(
    ("size", "tp", "experts", "topk", "intermediate"), [(8, 1, 128, 8, 768), (8, 2, 64, 4, 1408)]
)
def test_a_model_of_full_size(size, tp, experts, topk, intermediate):
    spec = MoESpec(2048, intermediate, experts, topk, 8192, tp=tp, capacity_factor=1.25)
    config = TileConfig(block_m=128, block_tokens=64)
    rng = np.random.default_rng(0)
    ids = np.argsort(rng.random((size, 8192, experts)), axis=2)[:, :, :topk].astype(np.int32)
    weights = rng.random(ids.shape, dtype=np.float32)
    tables = RoutingTables(ids, weights, np.full(size, 8192, np.int32))
    shape = PlanShape(Geometry(spec, 3, size), config)
    planner, plan = device_plan(tables, shape)
    expected = make_plan(tables, shape)
    assert_equal(plan, expected)
    arguments = cp.asarray(ids), cp.asarray(weights), cp.asarray(tables.num_tokens)
    again = [planner.plan(*arguments) for _ in range(3)]
    assert_equal(again[-1], expected)
    begin, end = cp.cuda.Event(), cp.cuda.Event()
    begin.record()
    for _ in range(20):
        planner.plan(*arguments)
    end.record()
    end.synchronize()
    print(f"plan W={size} TP={tp}: {cp.cuda.get_elapsed_time(begin, end) / 20 * 1e3:.0f} us")


@pytest.mark.parametrize("model", ["qwen3-30b-a3b", "deepseek-v3"])
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("tokens", [1, 8, 64, 256])
def test_small_batches_of_a_model(model, size, tokens):
    spec = Cell(model, size, tokens=tokens).spec
    rng = np.random.default_rng(tokens)
    ids = np.argsort(rng.random((size, tokens, spec.num_experts)), axis=2)[:, :, : spec.topk]
    weights = rng.random(ids.shape, dtype=np.float32)
    num_tokens = np.full(size, tokens, np.int32)
    num_tokens[-1] = (tokens + 1) // 2
    tables = RoutingTables(ids.astype(np.int32), weights, num_tokens)
    times = {}
    for small in (False, True):
        shape = PlanShape(Geometry(spec, size - 1, size), TileConfig())
        planner, plan = device_plan(tables, shape, small)
        assert_equal(plan, make_plan(tables, shape))
        arguments = cp.asarray(tables.ids), cp.asarray(weights), cp.asarray(num_tokens)
        begin, end = cp.cuda.Event(), cp.cuda.Event()
        begin.record()
        for _ in range(20):
            planner.plan(*arguments)
        end.record()
        end.synchronize()
        times[small] = cp.cuda.get_elapsed_time(begin, end) / 20 * 1e3
    print(f"{model} W={size} T={tokens}: grid {times[False]:.0f} us, block {times[True]:.0f} us")


def test_experts_beyond_what_all_blocks_of_an_sm_have_room_for():
    spec = MoESpec(16, 16, num_experts=4096, topk=4, max_tokens=300, capacity_factor=4.0)
    rng = np.random.default_rng(2)
    ids = np.argsort(rng.random((2, 300, 4096)), axis=2)[:, :, :4].astype(np.int32)
    weights = rng.random(ids.shape, dtype=np.float32)
    tables = RoutingTables(ids, weights, np.array([300, 170], np.int32))
    shape = PlanShape(Geometry(spec, 1, 2), TileConfig(block_m=16))
    _, plan = device_plan(tables, shape)
    assert_equal(plan, make_plan(tables, shape))


@pytest.mark.parametrize(
    ("size", "tp", "experts", "topk"),
    [(2, 1, 32, 9), (4, 2, 24, 12), (3, 3, 40, 20), (40, 1, 80, 5)],
)
def test_many_pairs_a_token_and_many_ranks(size, tp, experts, topk):
    spec = MoESpec(16, 16 * tp, experts, topk, 200, tp=tp, capacity_factor=2.0 * size)
    rng = np.random.default_rng(topk)
    ids = np.argsort(rng.random((size, 200, experts)), axis=2)[:, :, :topk].astype(np.int32)
    ids[rng.random(ids.shape) < 0.2] = -1
    weights = rng.random(ids.shape, dtype=np.float32)
    tables = RoutingTables(ids, weights, rng.integers(0, 201, size).astype(np.int32))
    shape = PlanShape(Geometry(spec, size // 2, size), TileConfig(block_m=64, num_phases=3))
    _, plan = device_plan(tables, shape)
    assert_equal(plan, make_plan(tables, shape))


@pytest.mark.parametrize("small", [False, True], ids=["grid", "one block"])
@pytest.mark.parametrize("value", [-2, 12, 2**31 - 1])
def test_the_first_wrong_pair_is_found(value, small):
    spec = MoESpec(16, 16, num_experts=12, topk=3, max_tokens=40)
    rng = np.random.default_rng(1)
    ids = np.argsort(rng.random((4, 40, 12)), axis=2)[:, :, :3].astype(np.int32)
    weights = rng.random(ids.shape, dtype=np.float32)
    tokens = np.full(4, 30, np.int32)
    ids[:, 30:] = 99  # past the tokens: not looked at
    shape = PlanShape(Geometry(spec, 1, 4), TileConfig(block_m=16))
    ids[2, 7, 1] = value
    ids[3, 0, 0] = value
    planner, _ = device_plan(RoutingTables(ids, weights, tokens), shape, small)
    assert planner.wrong_pair() == (2 * 40 + 7) * 3 + 1
    ids[1, 9, 2] = ids[1, 9, 0]  # repeated
    planner, _ = device_plan(RoutingTables(ids, weights, tokens), shape, small)
    assert planner.wrong_pair() == (40 + 9) * 3 + 2
    weights[0, 29, 2] = np.nan
    planner, _ = device_plan(RoutingTables(ids, weights, tokens), shape, small)
    assert planner.wrong_pair() == 29 * 3 + 2


@pytest.mark.parametrize("small", [False, True], ids=["grid", "one block"])
def test_too_many_rows_are_counted(small):
    spec = MoESpec(16, 16, num_experts=8, topk=2, max_tokens=64, capacity_factor=0.5)
    ids = np.tile(np.array([5, 6], np.int32), (4, 64, 1))
    tables = RoutingTables(ids, np.ones(ids.shape, np.float32), np.full(4, 64, np.int32))
    for rank in range(4):
        shape = PlanShape(Geometry(spec, rank, 4), TileConfig(block_m=16))
        planner, _ = device_plan(tables, shape, small)
        with pytest.raises(cometrt.CapacityError) as error:
            make_plan(tables, shape)
        assert planner.largest_need() == (error.value.rank, error.value.need)
