"""What kernels of mode "fused" record of themselves, and what is recorded of other launches."""

import itertools

import numpy as np
import pytest

import cometrt
import cometrt.cuda.fused as fused
from cometrt.cuda.engine import layer_n_tiles
from cometrt.cuda.launch_trace import ROOM
from cometrt.plan import PlanShape
from cometrt.plan.reference import make_plan
from cometrt.plan.routing import RoutingTables
from cometrt.specs import Geometry
from tests.cases import Case, make_inputs, on_device, on_host

pytestmark = pytest.mark.gpu


def case_of(size, order="phases"):
    return Case((size, 1), order=order, mode="fused", gemm="engine", shard_columns=272)


def run(case, inputs, link=None, backward=False):
    """y without and with a trace, and the timeline, of each rank. The bits of y have those of the
    gradients behind them with `backward`, and the timeline has a backward then."""

    def fn(world):
        r, move = world.rank, on_device(world)
        weights = cometrt.shard_weights(inputs.w_up, inputs.w_down, r, case.size, case.spec)
        tables = [move(part[r]) for part in (inputs.x, inputs.ids, inputs.weights)]
        with cometrt.MoELayer(world, case.spec, case.mode, config=case.config) as layer:
            args, dy = (*tables, *map(move, weights)), move(inputs.dy[r])

            def step():
                y, saved = layer.forward(*args)
                return [y, *layer.backward(dy, saved)] if backward else [y]

            plain = step()
            layer.synchronize()
            with cometrt.trace.record(layer) as recording:
                traced = step()
            after = step()
            layer.synchronize()
            timeline = recording.gather()
        found = [b"".join(on_host(a).tobytes() for a in of) for of in (plain, traced, after)]
        return found, timeline

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
        for name, columns in zip(
            ("up", "down"), layer_n_tiles(shape, fused.forward_block_n(shape)), strict=True
        ):
            found = sorted((e.tile, e.column) for e in events if e.name == name)
            assert found == sorted(itertools.product(map(int, tiles), range(columns))), name
        crossing = crossing_tokens(case, inputs, rank)
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


def crossing_tokens(case, inputs, rank):
    """How many tokens of other ranks have an expert on this one."""
    source = np.repeat(np.arange(case.size), [len(ids) for ids in inputs.ids])
    local_experts = case.spec.num_experts // (case.size // case.spec.tp)
    here = (np.concatenate(inputs.ids) // local_experts == rank // case.spec.tp).any(axis=1)
    return int((here & (source != rank)).sum())


FORWARD = ["publish", "plan", "pull", "up", "down", "reduce and push", "reduce at home"]
DGRADS = ["down dgrad", "up dgrad", "reduce and push", "wgrad", "reduce at home"]


@pytest.mark.parametrize("gemm", ["engine", "cublas"])
@pytest.mark.parametrize("save", ["rows", "z"])
def test_launches_of_mode_sequential_are_recorded_and_change_nothing(gemm, save):
    case = Case((4, 1), mode="sequential", gemm=gemm, save=save)
    inputs = make_inputs(case)
    results = run(case, inputs, backward=True)
    timeline = results[0][1]
    for bits, same in results:
        assert len(set(bits)) == 1
        assert same.events == timeline.events
    begins = ["publish", "wait", *(["plan"] if gemm == "engine" else []), "pull"]
    backward = [*begins, *(["pull"] if save == "z" else []), *DGRADS]
    assert [one.name for one in timeline.passes] == ["forward", "backward"]
    for rank in range(case.size):
        events = [e for e in timeline.events if e.rank == rank]
        assert [e.name for e in events] == FORWARD + backward
        assert all(one.end_ns <= two.begin_ns for one, two in itertools.pairwise(events))
        moved = 2 * crossing_tokens(case, inputs, rank) * case.spec.hidden
        pulls = [e.link_bytes for e in events if e.name == "pull"]
        assert pulls == [moved] * (2 + (save == "z"))
        assert [e.link_bytes for e in events if e.name == "reduce and push"] == [moved] * 2
        assert {(e.cta, e.lane) for e in events} == {(-1, -1)}
    assert timeline.hidden_share == 0
    check_times(timeline)


def test_a_fused_call_has_its_preparation_as_launches():
    case = case_of(2)
    results = run(case, make_inputs(case), backward=True)
    assert all(len(set(bits)) == 1 for bits, _ in results)
    timeline = results[0][1]
    assert [one.name for one in timeline.passes] == ["forward", "backward"]
    for rank in range(case.size):
        launches = [e.name for e in timeline.events if e.rank == rank and e.cta < 0]
        assert launches == ["publish", "plan"] * 2
    check_times(timeline)


def test_calls_of_mode_chunked_record_nothing():
    case = Case((2, 1), mode="chunked", gemm="engine")
    assert run(case, make_inputs(case))[0][1].events == []


def test_a_graph_of_the_caller_outlives_a_recording():
    """Launches that a stream captures write no record: its memory is free when the graph runs."""
    case = Case((2, 1), mode="sequential", gemm="engine")
    inputs = make_inputs(case)

    def fn(world):
        import cupy

        r, move = world.rank, on_device(world)
        weights = cometrt.shard_weights(inputs.w_up, inputs.w_down, r, case.size, case.spec)
        args = [move(part[r]) for part in (inputs.x, inputs.ids, inputs.weights)]
        args += map(move, weights)
        with cometrt.MoELayer(world, case.spec, case.mode, config=case.config) as layer:
            plain, y = cupy.empty_like(args[0]), cupy.empty_like(args[0])
            layer.forward(*args, training=False, out=plain)
            layer.synchronize()
            stream = cupy.cuda.get_current_stream()
            with cometrt.trace.record(layer) as recording:
                stream.begin_capture()
                layer.forward(*args, training=False, out=y)
                graph = stream.end_capture()
            freed = cupy.zeros((ROOM, 3), cupy.uint64)  # memory of the records, most likely
            stream.synchronize()
            world.barrier()
            graph.launch(stream)
            world.barrier()
            layer.synchronize()
            stream.synchronize()
            same = on_host(y).tobytes() == on_host(plain).tobytes()
            return same, len(recording.events), bool(on_host(freed).any())

    assert cometrt.spawn(fn, case.size, "cuda", timeout_sec=10) == [(True, 0, False)] * 2
