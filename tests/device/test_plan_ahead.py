"""layer.plan() on CUDA: forwards with a plan made ahead have the bits of those that plan."""

import dataclasses
import re

import numpy as np
import pytest

import cometrt
from cometrt.kernels import launch
from tests.cases import ROUTINGS, Case, Output, check_case, make_inputs, on_host
from tests.device.pauses import Pauses
from tests.device.test_async import Gate
from tests.device.test_backward import Wide, wide_inputs
from tests.device.test_held_calls import behind, dirty_the_pool, is_nan
from tests.device.test_tune import COLUMNS, choose
from tests.host.test_failures import caught
from tests.host.test_orders import batches_of
from tests.plan_cases import PlanRank, check_planned_bits, check_reuse

pytestmark = pytest.mark.gpu
CASE = Case((4, 1), mode="fused", gemm="engine")
MODES = [("fused", "engine"), ("sequential", "engine"), ("chunked", "engine"),
         ("sequential", "cublas")]  # fmt: skip


@pytest.mark.parametrize("save", ["rows", "z", "nothing"])
@pytest.mark.parametrize(("mode", "gemm"), MODES)
@pytest.mark.parametrize("ranks", [(1, 1), (2, 1), (4, 2)], ids=str)
def test_the_bits_are_those_of_a_forward_with_tables(ranks, mode, gemm, save):
    check_planned_bits(Case(ranks, save=save, mode=mode, gemm=gemm), "cuda", timeout_sec=10)


@pytest.mark.parametrize("routing", list(ROUTINGS))
def test_every_routing(routing):
    case = dataclasses.replace(CASE, ranks=(4, 2), routing=routing, order="columns")
    check_planned_bits(case, "cuda", timeout_sec=10)


@pytest.mark.parametrize(
    ("mode", "changes"),
    [
        ("fused", {}),
        ("fused", {"order": "columns", "n_chunk": 512, "dispatch_ctas": 1, "num_phases": 4}),
        ("sequential", {}),
        ("chunked", {"pipeline_chunks": 3}),
    ],
    ids=str,
)
@pytest.mark.parametrize("ranks", [(1, 1), (4, 1), (4, 2)], ids=str)
def test_wide_layers(ranks, mode, changes):
    case = Wide(
        ranks, shard_columns=592, save="z", mode=mode, gemm="engine",
        changes=tuple(changes.items()),
    )  # fmt: skip
    check_planned_bits(case, "cuda", wide_inputs(case), timeout_sec=10)


@pytest.mark.parametrize("save", ["rows", "nothing"])
@pytest.mark.parametrize("mode", ["fused", "sequential", "chunked"])
@pytest.mark.parametrize("order", ["p0 p1 f1 f0 b0 b1", "f0 p1 b0 f1 p0 f0 b1 f1 b0 b1"])
@pytest.mark.parametrize("ranks", [(4, 1), (4, 2)], ids=str)
def test_plans_are_used_in_any_order_and_again(ranks, order, mode, save):
    case = Case(ranks, save=save, mode=mode, gemm="engine")
    check_reuse(case, order, "cuda", timeout_sec=10)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mode", ["fused", "sequential"])
def test_plans_and_forwards_return_before_the_device_begins(mode, training):
    inputs = make_inputs(CASE)

    def fn(world):
        import cupy

        rank = PlanRank(world, dataclasses.replace(CASE, mode=mode), [inputs])
        rank.layer.executor.graphs.enabled = False  # making one may wait for the device

        def calls():
            rank.plan(0)
            return [rank.planned_forward(0, training=training)[0] for _ in range(2)]

        expected, *_ = [calls() for _ in range(3)]  # memory is there from now on
        rank.layer.synchronize()
        gate = Gate()
        world.barrier()
        gate.close()
        results = calls()
        last = cupy.cuda.get_current_stream().record()
        assert not last.done
        world.barrier()
        gate.open()
        rank.layer.synchronize()
        for y in results:
            assert on_host(y).tobytes() == on_host(expected[0]).tobytes()

    cometrt.spawn(fn, CASE.size, "cuda", timeout_sec=10)


def test_a_plan_is_three_launches_and_a_planned_forward_five(monkeypatch):
    inputs = make_inputs(Case((1, 1)))
    launches, real = [], launch.Kernel.__call__

    def counted(self, *args, **more):
        launches.append(self)
        real(self, *args, **more)

    def fn(world):
        rank = PlanRank(world, dataclasses.replace(CASE, ranks=(1, 1)), [inputs])
        monkeypatch.setattr(launch.Kernel, "__call__", counted)
        rank.plan(0)
        of_plan = len(launches)
        rank.planned_forward(0)
        rank.layer.synchronize()
        return of_plan, len(launches) - of_plan

    assert cometrt.spawn(fn, 1, "cuda") == [(3, 5)]


@pytest.mark.parametrize("ranks", [(1, 1), (4, 1)], ids=str)
def test_calls_that_come_again_are_replayed(ranks):
    case = dataclasses.replace(CASE, ranks=ranks)
    inputs = make_inputs(case)

    def fn(world):
        rank = PlanRank(world, case, [inputs])
        kernels = rank.layer.executor.kernels
        launches, real = [], kernels["publish"]

        def counted(*args):
            launches.append(args)
            real(*args)

        kernels["publish"] = counted
        digests, counts = set(), []
        for _ in range(40):  # the allocator's addresses come again after a few steps
            rank.plans.clear()
            rank.plan(0)
            digests.add(rank.backward(0, *rank.planned_forward(0)).digest())
            counts.append(len(launches))
        assert len(digests) == 1
        assert counts[-1] == counts[-8]  # neither launched nor captured

    cometrt.spawn(fn, case.size, "cuda", timeout_sec=10)


@pytest.mark.parametrize("save", ["rows", "nothing"])
@pytest.mark.parametrize("mode", ["fused", "sequential", "chunked"])
@pytest.mark.parametrize("ranks", [(1, 1), (4, 2)], ids=str)
def test_a_step_that_plans_ahead_is_captured_and_replayed(ranks, mode, save):
    """With new tokens and routing. Its forward is recomputed from the same plan."""
    case = Case(ranks, mode=mode, gemm="engine", save=save)
    batches = [make_inputs(Case(ranks, routing)) for routing in ("uniform", "skewed", "uniform")]
    count = min(len(x) for batch in batches for x in batch.x)
    assert count > 0

    def fn(world):
        import cupy

        rank = PlanRank(world, case, batches)
        layer, weights = rank.layer, {"w_up": rank.w_up, "w_down": rank.w_down}
        for batch in rank.batches:
            for name, array in batch.items():
                batch[name] = array[:count]
        given = {name: array.copy() for name, array in rank.batches[0].items()}
        stream = cupy.cuda.get_current_stream()
        shapes = layer.geometry.w_up_shape, layer.geometry.w_down_shape
        y = cupy.empty_like(given["x"])
        gradients = cometrt.Gradients(
            cupy.empty_like(y),
            cupy.empty_like(given["weights"]),
            *(cupy.empty(shape, cupy.float32) for shape in shapes),
        )

        def step():
            plan = layer.plan(given["ids"], given["weights"])
            layer.forward(given["x"], plan=plan, training=False, out=y, **weights)
            _, saved = layer.forward(given["x"], plan=plan, out=y, **weights)
            layer.backward(given["dy"], saved, out=gradients)

        def results():
            layer.synchronize()
            return [on_host(array).tobytes() for array in (y, *gradients)]

        def unplanned():
            tables = given["ids"], given["weights"]
            _, saved = layer.forward(given["x"], *tables, **weights, out=y)
            layer.backward(given["dy"], saved, out=gradients)
            return results()

        step()
        results()
        world.barrier()
        stream.begin_capture()
        step()
        graph = stream.end_capture()
        graph.upload(stream)
        stream.synchronize()
        for batch in rank.batches:
            for name, array in batch.items():
                given[name][...] = array
            for array in (y, *gradients):
                array.fill(np.nan)
            stream.synchronize()
            world.barrier()
            graph.launch(stream)
            world.barrier()
            stream.synchronize()
            found = results()
            assert found == unplanned()
        # A replay with wrong routing: what is queued behind its plan does nothing.
        given["ids"][0, 0] = case.spec.num_experts
        stream.synchronize()
        world.barrier()
        graph.launch(stream)
        world.barrier()
        stream.synchronize()
        with pytest.raises(cometrt.RoutingError, match="rank 0, token 0, k 0"):
            layer.synchronize()
        assert is_nan(y)
        assert all(is_nan(gradient) for gradient in gradients)

    cometrt.spawn(fn, case.size, "cuda", timeout_sec=10)


def test_cublas_is_not_captured():
    case = Case((1, 1), mode="sequential", gemm="cublas")
    inputs = make_inputs(case)

    def fn(world):
        import cupy

        rank = PlanRank(world, case, [inputs])
        rank.plan(0)
        rank.layer.synchronize()
        stream = cupy.cuda.get_current_stream()
        stream.begin_capture()
        for call, name in ((rank.plan, "plan"), (rank.planned_forward, "forward")):
            with pytest.raises(ValueError, match=f"{name} must not be captured"):
                call(0)
        stream.end_capture()

    cometrt.spawn(fn, 1, "cuda")


# publish, plan, finish; publish, prepare_planned, dispatch_gemm, gemm_combine, finish
@pytest.mark.parametrize("before", range(8))
def test_a_rank_that_is_late_before_any_launch(before):
    inputs = make_inputs(CASE)

    def fn(world):
        rank = PlanRank(world, CASE, [inputs])
        rank.layer.executor.graphs.enabled = False
        expected = rank.backward(0, *rank.forward(0))
        pauses = Pauses()
        world.barrier()
        if world.rank == 1:
            pauses.hold_up(rank.layer)
            late = [0] * 8
            late[before] = 20_000
            pauses.next = iter(late)
        rank.plan(0)
        assert rank.backward(0, *rank.planned_forward(0)).digest() == expected.digest()
        return expected

    check_case(CASE, inputs, cometrt.spawn(fn, CASE.size, "cuda", timeout_sec=10))


def test_with_an_emulated_link():
    inputs = make_inputs(CASE)

    def fn(world):
        rank = PlanRank(world, CASE, [inputs])
        rank.plan(0)
        return rank.backward(0, *rank.planned_forward(0))

    check_case(CASE, inputs, cometrt.spawn(fn, CASE.size, "cuda", timeout_sec=10, link="h100"))


def test_stats_and_the_buffer_of_a_plan():
    inputs = make_inputs(CASE)

    def fn(world):
        rank = PlanRank(world, CASE, [inputs])
        tokens = rank.batches[0]["x"]
        x = rank.layer.buffer()[: len(tokens)]
        x[...] = tokens
        plan = rank.plan(0)
        rank.layer.synchronize()
        planned = rank.layer.stats()
        assert (planned.epoch, int(plan[1].get()[0])) == (1, 1)
        y, saved = rank.layer.forward(x, plan=plan, w_up=rank.w_up, w_down=rank.w_down)
        rank.layer.synchronize()
        after = rank.layer.stats()
        assert (after.epoch, int(saved[1].get()[0])) == (2, 2)
        assert after.rows.tolist() == planned.rows.tolist()
        assert saved[4] is plan[2]  # meta, epoch, x, z, tables
        return rank.backward(0, y, saved)

    check_case(CASE, inputs, cometrt.spawn(fn, CASE.size, "cuda", timeout_sec=10))


# ---- failures -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "gemm"), MODES)
@pytest.mark.parametrize("fault", ["routing", "capacity"])
def test_a_failed_plan(fault, mode, gemm):
    """Its error comes first; a forward with it says so each time; the layer goes on."""
    case = dataclasses.replace(CASE, mode=mode, gemm=gemm)
    inputs, spec = make_inputs(case), case.spec
    if fault == "capacity":  # room for few rows; a call of one token a rank fits
        spec = dataclasses.replace(spec, capacity_factor=0.01)
        for ids in inputs.ids:
            ids[0] = range(ids.shape[1])
    kind = cometrt.RoutingError if fault == "routing" else cometrt.CapacityError
    made = type("Made", (Case,), {"spec": spec})(**dataclasses.asdict(case))

    def fn(world):
        rank = PlanRank(world, made, [inputs])
        batch, weights = rank.batches[0], {"w_up": rank.w_up, "w_down": rank.w_down}
        ids = batch["ids"].copy()
        if fault == "routing" and world.rank == 1:
            ids[3, 1] = spec.num_experts

        def one_token():
            plan = rank.layer.plan(batch["ids"][:1], batch["weights"][:1])
            y, saved = rank.layer.forward(batch["x"][:1], plan=plan, **weights)
            grads = rank.layer.backward(batch["dy"][:1], saved)
            rank.layer.synchronize()
            return Output(on_host(y), cometrt.Gradients(*map(on_host, grads)))

        good, gate = one_token(), Gate()  # memory is there from now on
        dirty_the_pool()
        with behind(world, gate):
            plan = rank.layer.plan(ids, batch["weights"])
            if gemm == "engine":  # cuBLAS waits for the device
                y, saved = rank.layer.forward(batch["x"], plan=plan, **weights)
                grads = rank.layer.backward(batch["dy"], saved)
        with pytest.raises(kind):
            rank.layer.synchronize()
        if gemm == "engine":
            assert is_nan(y)
            assert all(is_nan(grad) for grad in grads)
        for _ in range(2):
            y, saved = rank.layer.forward(batch["x"], plan=plan, **weights)
            with pytest.raises(cometrt.CometError, match="its plan failed"):
                rank.layer.synchronize()
            assert is_nan(y)
        rank.layer.backward(batch["dy"], saved)
        with pytest.raises(cometrt.CometError, match="its forward failed"):
            rank.layer.synchronize()
        assert one_token().digest() == good.digest()
        return good

    outputs = cometrt.spawn(fn, case.size, "cuda", timeout_sec=10)
    for part in (inputs.x, inputs.dy, inputs.ids, inputs.weights):
        part[:] = [array[:1] for array in part]
    check_case(case, inputs, outputs)


@pytest.mark.parametrize("other", ["forward", "plan 1", "plan"])
@pytest.mark.parametrize("mode", ["fused", "sequential"])
def test_ranks_that_do_not_use_the_same_plan_are_a_mismatch(mode, other):
    case = dataclasses.replace(CASE, mode=mode)
    batches = batches_of(case, 2)

    def fn(world):
        rank = PlanRank(world, case, batches)
        plan = rank.plan(0)
        rank.plan(1)
        calls = {
            "forward": lambda: rank.forward(0),
            "plan 1": lambda: rank.planned_forward(1),
            "plan": lambda: rank.plan(0),
        }
        call = calls[other] if world.rank == 1 else lambda: rank.planned_forward(0)
        error = caught(call) or caught(rank.layer.synchronize)
        world.reset()
        with pytest.raises(ValueError, match=re.escape("reset() changes it")):
            rank.planned_forward(0, plan)
        rank.plan(0)
        return error, rank.backward(0, *rank.planned_forward(0))

    results = cometrt.spawn(fn, case.size, "cuda", timeout_sec=10)
    texts = {
        "forward": "rank 1: forward of layer 0",
        "plan 1": "rank 1: planned forward of layer 0 (with the plan of epoch 2)",
        "plan": "rank 1: plan of layer 0",
    }
    for error, _ in results:
        assert isinstance(error, cometrt.MismatchError), error
        assert "rank 0: planned forward of layer 0 (with the plan of epoch 1)" in str(error)
        assert texts[other] in str(error)
    check_case(case, batches[0], [output for _, output in results])


def test_a_plan_made_before_tune_changed_the_tables_is_refused(monkeypatch):
    choose(monkeypatch, COLUMNS)
    inputs = make_inputs(CASE)
    made = type("Made", (Case,), {"config": cometrt.TileConfig()})(**dataclasses.asdict(CASE))

    def fn(world):
        rank = PlanRank(world, made, [inputs])
        plan = rank.plan(0)
        assert rank.layer.tune() == COLUMNS
        with pytest.raises(ValueError, match=re.escape("tune() may change it")):
            rank.planned_forward(0, plan)
        rank.plan(0)
        return rank.backward(0, *rank.planned_forward(0))

    check_case(CASE, inputs, cometrt.spawn(fn, CASE.size, "cuda", timeout_sec=10))
