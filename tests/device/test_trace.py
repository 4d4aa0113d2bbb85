"""What the kernels of the fused forward record of themselves."""

import itertools

import numpy as np
import pytest

import cometrt
from cometrt.kernels.constants import BLOCK_N
from cometrt.plan import PlanShape
from cometrt.plan.reference import make_plan
from cometrt.plan.routing import RoutingTables
from cometrt.plan.tile_order import num_n_tiles
from cometrt.specs import Geometry
from tests.cases import Case, make_inputs, on_device, on_host

pytestmark = pytest.mark.gpu


def case_of(size, order="phases"):
    return Case((size, 1), order=order, mode="fused", gemm="engine", shard_columns=272)


def run(case, inputs, link=None):
    """y without and with a trace, and the timeline, of each rank."""

    def fn(world):
        r, move = world.rank, on_device(world)
        weights = cometrt.shard_weights(inputs.w_up, inputs.w_down, r, case.size, case.spec)
        tables = [move(part[r]) for part in (inputs.x, inputs.ids, inputs.weights)]
        with cometrt.MoELayer(world, case.spec, case.mode, config=case.config) as layer:
            args = (*tables, *map(move, weights))
            plain, _ = layer.forward(*args)
            layer.synchronize()
            with cometrt.trace.record(layer) as recording:
                traced, _ = layer.forward(*args)
            after, _ = layer.forward(*args)
            layer.synchronize()
            timeline = recording.gather()
        return [on_host(y).tobytes() for y in (plain, traced, after)], timeline

    return cometrt.spawn(fn, case.size, "cuda", timeout_sec=10, link=link)


def plans_of(case, inputs):
    spec, size = case.spec, case.size
    ids = np.full((size, spec.max_tokens, spec.topk), -1, np.int32)
    weights = np.zeros(ids.shape, np.float32)
    for rank, (i, w) in enumerate(zip(inputs.ids, inputs.weights, strict=True)):
        ids[rank, : len(i)], weights[rank, : len(w)] = i, w
    tokens = np.array([len(i) for i in inputs.ids], np.int32)
    for rank in range(size):
        shape = PlanShape(Geometry(spec, rank, size), case.config)
        yield shape, make_plan(RoutingTables(ids, weights, tokens), shape)


@pytest.mark.parametrize("order", ["phases", "columns"])
@pytest.mark.parametrize("size", [2, 4])
def test_every_tile_block_and_row_is_recorded_and_changes_nothing(size, order):
    case = case_of(size, order)
    inputs = make_inputs(case)
    results = run(case, inputs)
    timeline = results[0][1]
    for bits, same in results:
        assert len(set(bits)) == 1
        assert same.events == timeline.events
    for rank, (shape, plan) in enumerate(plans_of(case, inputs)):
        spec = case.spec
        events = [e for e in timeline.events if e.rank == rank]
        tiles = plan.dispatch_order()
        up = num_n_tiles(shape.geometry.local_intermediate, gated=spec.gated)
        for name, columns in (("up", up), ("down", -(-spec.hidden // BLOCK_N))):
            found = sorted((e.tile, e.column) for e in events if e.name == name)
            assert found == sorted(itertools.product(map(int, tiles), range(columns))), name
        source = np.repeat(np.arange(size), [len(ids) for ids in inputs.ids])
        experts = np.concatenate(inputs.ids) // shape.geometry.local_experts
        crossing = int(((experts == rank).any(axis=1) & (source != rank)).sum())
        for name in ("pull", "reduce and push"):
            assert timeline.link_bytes(rank, name) == 2 * crossing * spec.hidden, name
        chunks = range(len(case.config.n_chunks(spec.hidden)))
        of_block = case.config.tokens_per_block(max(map(len, inputs.ids)))
        blocks = range(-(-len(inputs.ids[rank]) // of_block))
        # A block is added up in as many batches as its addends need.
        found = {(e.tile, e.column) for e in events if e.name == "reduce at home"}
        assert found == set(itertools.product(blocks, chunks))
    check_times(timeline)


def check_times(timeline):
    assert all(0 < e.begin_ns <= e.end_ns for e in timeline.events)
    assert timeline.span_sec < 10
    assert 0 <= timeline.hidden_share <= 1
    threads = {(e.rank, e.cta, e.lane) for e in timeline.events}
    for thread in threads:
        spans = sorted(
            (e.begin_ns, e.end_ns) for e in timeline.events if (e.rank, e.cta, e.lane) == thread
        )
        assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans)), thread
    for shares in timeline.waits().values():
        assert sum(shares.values()) <= 1 + 1e-9


def test_a_slow_link_is_what_movers_wait_for():
    case = case_of(4)
    timeline = run(case, make_inputs(case), link="h100")[0][1]
    check_times(timeline)
    waits = timeline.waits()
    assert all(waits[rank, "comm"].get("link", 0) > 0 for rank in range(4))


def test_calls_that_are_not_fused_record_nothing():
    case = Case((2, 1), mode="sequential", gemm="engine")
    assert run(case, make_inputs(case))[0][1].events == []
