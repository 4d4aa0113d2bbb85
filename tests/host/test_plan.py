"""Properties of the planner, over random and adversarial routings, all ranks' plans together."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cometrt
from cometrt.plan import PlanShape, TileConfig
from cometrt.plan.reference import make_plan
from cometrt.plan.routing import RoutingTables
from cometrt.plan.tables import plan_table_shapes
from cometrt.specs import Geometry, MoESpec


@st.composite
def routings(draw):
    """(spec, config, size, tables): few experts, so that many pairs meet in one."""
    tp = draw(st.integers(1, 3))
    ep = draw(st.integers(1, 4))
    num_experts = ep * draw(st.integers(1, 3))
    topk = draw(st.integers(1, min(num_experts, 4)))
    max_tokens = draw(st.integers(1, 24))
    spec = MoESpec(
        hidden=16,
        intermediate=16 * tp,
        num_experts=num_experts,
        topk=topk,
        max_tokens=max_tokens,
        tp=tp,
        capacity_factor=100.0,
    )
    config = TileConfig(
        block_m=draw(st.sampled_from([1, 4, 16])),
        block_tokens=draw(st.sampled_from([1, 3, 8])),
        min_token_blocks=draw(st.sampled_from([1, 3, 256])),
        num_phases=draw(st.sampled_from([1, 2, 3, 99])),
    )
    size, seed = ep * tp, draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    num_tokens = rng.integers(0, max_tokens + 1, size) * (rng.random(size) < 0.85)
    scores = rng.normal(scale=draw(st.sampled_from([0.0, 3.0])), size=num_experts)
    noisy = scores + rng.gumbel(size=(size, max_tokens, num_experts))
    ids = np.argsort(-noisy, axis=2)[:, :, :topk].astype(np.int32)
    ids[rng.random(ids.shape) < draw(st.sampled_from([0.0, 0.3, 1.0]))] = -1
    weights = rng.uniform(0.5, 1.5, ids.shape).astype(np.float32)
    return spec, config, size, RoutingTables(ids, weights, num_tokens.astype(np.int32))


def plans_of(case):
    spec, config, size, tables = case
    shapes = [PlanShape(Geometry(spec, rank, size), config) for rank in range(size)]
    return shapes, [make_plan(tables, shape) for shape in shapes]


def kept_pairs(case):
    """{(source, token, k): expert} of every pair that must be computed."""
    _, _, size, tables = case
    return {
        (s, t, k): int(tables.ids[s, t, k])
        for s in range(size)
        for t in range(tables.num_tokens[s])
        for k in range(tables.ids.shape[2])
        if tables.ids[s, t, k] >= 0
    }


def split_pair(pair, spec):
    token, k = divmod(int(pair), spec.topk)
    source, token = divmod(token, spec.max_tokens)
    return source, token, k


@settings(max_examples=150)
@given(routings())
def test_every_pair_is_in_exactly_one_row_of_every_shard_of_its_group(case):
    spec, config, _, tables = case
    shapes, plans = plans_of(case)
    pairs = kept_pairs(case)
    for shape, plan in zip(shapes, plans, strict=True):
        geometry = shape.geometry
        first = geometry.group * geometry.local_experts
        seen = set()
        for expert in range(geometry.local_experts):
            begin, end = plan.expert_offsets[expert : expert + 2]
            rows = plan.expert_rows[expert]
            assert begin % config.block_m == 0
            assert 0 <= end - begin - rows < config.block_m
            keys = []
            for row in range(begin, begin + rows):
                source, token, k = split_pair(plan.row_pair[row], spec)
                assert pairs[source, token, k] == first + expert
                assert plan.row_weight[row] == tables.weights[source, token, k]
                assert plan.pair_row[source * spec.max_tokens + token, k] == row
                keys.append((geometry.distance(source), token))
                seen.add((source, token, k))
            assert keys == sorted(keys)
            assert (plan.row_pair[begin + rows : end] == -1).all()
            assert (plan.row_weight[begin + rows : end] == 0).all()
        mine = {p for p, e in pairs.items() if first <= e < first + geometry.local_experts}
        assert seen == mine
        assert (plan.pair_row >= 0).sum() == len(mine)
        assert plan.num_rows <= shape.capacity


@settings(max_examples=150)
@given(routings())
def test_orders_are_permutations_and_serve_near_sources_first(case):
    spec, config, size, _ = case
    shapes, plans = plans_of(case)
    for shape, plan in zip(shapes, plans, strict=True):
        order = plan.dispatch_order()
        assert sorted(order) == list(range(plan.num_rows // config.block_m))
        assert plan.combine_order() == order[::-1]
        keys = []
        for tile in order:
            pairs = plan.row_pair[tile * config.block_m : (tile + 1) * config.block_m]
            sources = [split_pair(p, spec)[0] for p in pairs if p >= 0]
            distance = max(shape.geometry.distance(s) for s in sources)
            assert plan.tile_distance[tile] == distance
            expert = plan.tile_expert[tile]
            assert plan.expert_offsets[expert] <= tile * config.block_m
            assert tile * config.block_m < plan.expert_offsets[expert + 1]
            phase = np.searchsorted(config.last_distances(size), distance)
            keys.append((phase, expert, tile))
        assert keys == sorted(keys)


@settings(max_examples=150)
@given(routings())
def test_each_needed_token_is_pulled_once_before_the_first_tile_that_needs_it(case):
    spec, config, _, _ = case
    shapes, plans = plans_of(case)
    for shape, plan in zip(shapes, plans, strict=True):
        needed = set(np.flatnonzero((plan.pair_row >= 0).any(axis=1)))
        arrived: set[int] = set()
        for position, tile in enumerate(plan.dispatch_order()):
            pulls = [int(t) for t in plan.pulls_of(position)]
            assert not arrived & set(pulls)
            arrived |= set(pulls)
            distances = [shape.geometry.distance(t // spec.max_tokens) for t in pulls]
            assert list(zip(distances, pulls, strict=True)) == sorted(
                zip(distances, pulls, strict=True)
            )
            rows = slice(tile * config.block_m, (tile + 1) * config.block_m)
            here = {int(p) // spec.topk for p in plan.row_pair[rows] if p >= 0}
            assert here <= arrived
            assert set(pulls) <= here  # not a tile earlier than needed
        assert arrived == needed


@settings(max_examples=150)
@given(routings())
def test_contributors_and_homes_agree_on_every_slot(case):
    spec, _, size, _ = case
    shapes, plans = plans_of(case)
    for home in range(size):
        written = {}
        for contributor in range(size):
            plan = plans[contributor]
            for to, block, tokens in plan.pushes(shapes[contributor]):
                if to != home:
                    continue
                assert contributor != home
                for i, token in enumerate(tokens):
                    row = plan.send_base[home] + block * int(plan.block_tokens[0]) + i
                    assert row not in written
                    written[row] = (contributor, int(token) - home * spec.max_tokens, block)
        assert all(0 <= row < shapes[home].staging_rows for row in written)
        plan = plans[home]
        read = {}
        for token, distance in zip(*np.nonzero(plan.staging_row >= 0), strict=True):
            row = int(plan.staging_row[token, distance])
            block = (row - plan.staging_base[distance]) // int(plan.block_tokens[0])
            read[row] = ((home + distance) % size, int(token), int(block))
        assert read == written


@settings(max_examples=150)
@given(routings())
def test_blocks_leave_in_the_order_in_which_gemm_combine_finishes_them(case):
    spec, config, _size, _ = case
    shapes, plans = plans_of(case)
    for shape, plan in zip(shapes, plans, strict=True):
        position = {tile: p for p, tile in enumerate(plan.combine_order())}
        ready, sent = [], []
        for home, block, tokens in plan.pushes(shape):
            rows = plan.pair_row[tokens]
            last = max(position[row // config.block_m] for row in rows[rows >= 0])
            ready.append((last, shape.geometry.distance(home), block))
            sent.extend(int(t) for t in tokens)
        assert ready == sorted(ready)
        first = shape.geometry.rank * spec.max_tokens
        own = set(range(first, first + spec.max_tokens))
        needed = set(np.flatnonzero((plan.pair_row >= 0).any(axis=1))) - own
        assert sorted(sent) == sorted(needed)


@settings(max_examples=60)
@given(routings())
def test_a_source_is_complete_once_its_wave_is(case):
    """Layer1 backwards: no tile after the first with a key below d holds rows of distance d."""
    spec, config, _, _ = case
    shapes, plans = plans_of(case)
    for shape, plan in zip(shapes, plans, strict=True):
        for tile in plan.combine_order():
            pairs = plan.row_pair[tile * config.block_m : (tile + 1) * config.block_m]
            for pair in pairs[pairs >= 0]:
                source = split_pair(pair, spec)[0]
                assert shape.geometry.distance(source) <= plan.tile_distance[tile]


@settings(max_examples=60)
@given(routings())
def test_tables_have_fixed_shapes_and_do_not_depend_on_what_lies_past_num_tokens(case):
    spec, _config, _size, tables = case
    shapes, plans = plans_of(case)
    garbage = RoutingTables(tables.ids.copy(), tables.weights.copy(), tables.num_tokens)
    past = np.arange(spec.max_tokens) >= tables.num_tokens[:, None]
    garbage.ids[past], garbage.weights[past] = 10**6, np.nan
    empty = RoutingTables(np.full_like(tables.ids, -1), tables.weights, tables.num_tokens)
    for shape, plan in zip(shapes, plans, strict=True):
        shapes_of = {name: getattr(plan, name).shape for name in plan_table_shapes(shape)}
        assert shapes_of == plan_table_shapes(shape)
        for array, other, bare in zip(
            plan.arrays(),
            make_plan(garbage, shape).arrays(),
            make_plan(empty, shape).arrays(),
            strict=True,
        ):
            np.testing.assert_array_equal(array, other)
            assert array.shape == bare.shape
            assert array.dtype == bare.dtype


@settings(max_examples=100)
@given(routings())
def test_capacity_is_enough_for_the_worst_case_and_counted_exactly(case):
    spec, config, size, tables = case
    _shapes, plans = plans_of(case)
    need = max(plan.num_rows for plan in plans)
    tight = dataclasses.replace(spec, capacity_factor=1e-6)
    shape = PlanShape(Geometry(tight, 0, size), config)
    if need <= shape.capacity:
        make_plan(tables, shape)
    else:
        with pytest.raises(cometrt.CapacityError) as error:
            make_plan(tables, shape)
        assert (error.value.need, error.value.capacity) == (need, shape.capacity)
        assert plans[error.value.rank].num_rows == need
        wider = dataclasses.replace(spec, capacity_factor=error.value.capacity_factor)
        make_plan(tables, PlanShape(Geometry(wider, 0, size), config))


def test_balanced_routing_fits_a_capacity_factor_of_one():
    spec = MoESpec(16, 16, num_experts=8, topk=2, max_tokens=32, capacity_factor=1.0)
    ids = (np.arange(4 * 32 * 2) % 8).reshape(4, 32, 2).astype(np.int32)
    tables = RoutingTables(ids, np.ones(ids.shape, np.float32), np.full(4, 32, np.int32))
    for block_m in (1, 16, 24, 64):
        shape = PlanShape(Geometry(spec, 1, 4), TileConfig(block_m=block_m))
        assert make_plan(tables, shape).expert_rows.sum() == 64


@pytest.mark.parametrize("max_tokens", [128, 256])
def test_the_room_for_padding_takes_the_skew_of_small_layers(max_tokens):
    """README and guide say so. All tokens of four ranks choose the experts of rank 0."""
    spec = MoESpec(16, 16, num_experts=128, topk=8, max_tokens=max_tokens)
    ids = np.tile(np.arange(8, dtype=np.int32), (4, max_tokens, 1))
    num_tokens = np.full(4, max_tokens, np.int32)
    tables = RoutingTables(ids, np.ones(ids.shape, np.float32), num_tokens)
    shape = PlanShape(Geometry(spec, 0, 4), TileConfig())
    assert 4 * max_tokens * 8 > spec.capacity_factor * shape.balanced_rows
    if max_tokens == 128:
        assert make_plan(tables, shape).expert_rows.sum() == 4 * max_tokens * 8
    else:
        with pytest.raises(cometrt.CapacityError):
            make_plan(tables, shape)


@pytest.mark.parametrize(("order", "chunks"), [("phases", 1), ("columns", 3)])
def test_chunks_and_n_tiles_cover_all_columns_once(order, chunks):
    config = TileConfig(block_n=32, n_chunk=64, order=order)
    ranges = config.n_chunks(144)
    assert len(ranges) == chunks
    columns = [c for lo, hi in ranges for a, b in config.n_tiles(lo, hi) for c in range(a, b)]
    assert columns == list(range(144))
    assert all(b - a <= 32 for lo, hi in ranges for a, b in config.n_tiles(lo, hi))
