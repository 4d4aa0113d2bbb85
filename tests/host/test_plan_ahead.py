"""layer.plan(): forwards with a plan made ahead have the bits of those that plan for themselves."""

import re

import numpy as np
import pytest

import cometrt
from cometrt.plan import PlanShape
from tests.cases import ROUTINGS, Case, Output, check_case, make_inputs
from tests.faults import jitter
from tests.host.test_failures import caught
from tests.host.test_orders import batches_of
from tests.plan_cases import PlanRank, check_planned_bits, check_reuse

RANKS = [(1, 1), (2, 1), (4, 1), (2, 2), (4, 2), (8, 4)]
CASE = Case((2, 1))


@pytest.mark.parametrize("mode", ["fused", "sequential"])
@pytest.mark.parametrize("ranks", RANKS, ids=str)
@pytest.mark.parametrize("save", ["rows", "z", "nothing"])
def test_the_bits_are_those_of_a_forward_with_tables(ranks, save, mode):
    check_planned_bits(Case(ranks, save=save, mode=mode), "host")


@pytest.mark.parametrize("routing", list(ROUTINGS))
def test_every_routing(routing):
    check_planned_bits(Case((4, 2), routing, order="columns"), "host")


@pytest.mark.parametrize("save", ["rows", "nothing"])
@pytest.mark.parametrize("ranks", [(4, 1), (4, 2)], ids=str)
@pytest.mark.parametrize(
    "order",
    ["p0 p1 f1 f0 b0 b1", "p0 f0 f0 b0 b0", "f0 p1 b0 f1 p0 f0 b1 f1 b0 b1"],
)
def test_plans_are_used_in_any_order_and_again(ranks, save, order):
    check_reuse(Case(ranks, save=save), order, "host")


@pytest.mark.parametrize("seed", range(3))
def test_ranks_that_come_late_do_not_change_a_bit(seed):
    order = "p0 p1 f1 f0 b0 f1 b1 b1"
    case = Case([(4, 1), (4, 2), (3, 3)][seed], save="z")
    check_reuse(case, order, "host", lambda rank: jitter(10 * seed + rank, 0.004))


def test_a_plan_outlives_its_tables_and_leaves_the_buffer_alone():
    inputs = make_inputs(CASE)

    def fn(world):
        rank = PlanRank(world, CASE, [inputs])
        tokens = inputs.x[world.rank]
        x = rank.layer.buffer()[: len(tokens)]
        x[:] = tokens
        ids, weights = inputs.ids[world.rank].copy(), inputs.weights[world.rank].copy()
        plan = rank.layer.plan(ids, weights)
        ids[:], weights[:] = -1, np.nan
        y, saved = rank.layer.forward(x, plan=plan, w_up=rank.w_up, w_down=rank.w_down)
        return Output(y, rank.layer.backward(inputs.dy[world.rank], saved))

    check_case(CASE, inputs, cometrt.spawn(fn, 2))


def test_inference_takes_a_plan_and_saves_nothing():
    inputs = make_inputs(CASE)

    def fn(world):
        rank = PlanRank(world, CASE, [inputs])
        plan, weights = rank.plan(0), {"w_up": rank.w_up, "w_down": rank.w_down}
        x, expected = inputs.x[world.rank], rank.forward(0)[0]
        y, saved = rank.layer.forward(x, plan=plan, training=False, **weights)
        assert saved is None
        assert y.tobytes() == expected.tobytes()

    cometrt.spawn(fn, 2)


def test_plan_is_an_exchange_with_stats_of_its_own():
    inputs = make_inputs(CASE)

    def fn(world):
        rank = PlanRank(world, CASE, [inputs])
        plan = rank.plan(0)
        planned = rank.layer.stats()
        _, saved = rank.planned_forward(0, plan)
        after = rank.layer.stats()
        assert (planned.epoch, after.epoch) == (1, 2)
        assert plan[1][0] == 1
        assert saved[1][0] == 2
        assert planned.rows.tolist() == after.rows.tolist()
        assert planned.rows.sum() > 0

    cometrt.spawn(fn, 2)


# ---- wrong arguments ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"plan": None}, "either topk_ids and topk_weights, or plan (got none of them)"),
        ({"topk_ids": "ids"}, "or plan (got topk_ids and plan)"),
        ({"topk_ids": "ids", "topk_weights": "weights"}, "(got topk_ids and topk_weights and plan"),
        ({"plan": None, "topk_ids": "ids"}, "or plan (got topk_ids)"),
        ({"plan": None, "topk_weights": "weights"}, "or plan (got topk_weights)"),
        ({"plan": "saved"}, "plan must be the tuple of 22 that plan returned (got 26 items)"),
        ({"plan": 3}, "plan must be the tuple of 22 that plan returned (got <class 'int'>)"),
        ({"plan": "cut"}, "(got 21 items)"),
        ({"plan": "headless"}, "plan must begin with plan's meta array"),
        ({"plan": "float"}, "plan[2] (expert_offsets) must have dtype int32 (got float64)"),
        ({"plan": "other"}, "plan must come from this layer's plan (layer is 0, got 1"),
        ({"x": "short"}, "x must have the"),
        ({"w_up": None}, "w_up must be a numpy.ndarray"),
        ({"stream": 7}, "stream must be None on device='host' (got 7)"),
    ],
)
def test_wrong_arguments_of_a_forward_with_a_plan(change, message):
    inputs = make_inputs(CASE)

    def fn(world):
        r = world.rank
        rank = PlanRank(world, CASE, [inputs])
        other = cometrt.MoELayer(world, CASE.spec, config=CASE.config)
        tables = inputs.ids[r], inputs.weights[r]
        plan = rank.plan(0)
        given = {
            "saved": rank.forward(0)[1],
            "other": other.plan(*tables),
            "cut": plan[:-1],
            "headless": (plan[1], *plan[1:]),
            "float": (*plan[:2], plan[2].astype(float), *plan[3:]),
            "short": inputs.x[r][1:],
            "ids": tables[0],
            "weights": tables[1],
        }
        good = {"x": inputs.x[r], "plan": plan, "w_up": rank.w_up, "w_down": rank.w_down}
        if r == 1:
            bad = {
                name: given[value] if isinstance(value, str) else value
                for name, value in change.items()
            }
            with pytest.raises(ValueError, match=re.escape(message)):
                rank.layer.forward(**(good | bad))
        y, saved = rank.layer.forward(**good)
        return Output(y, rank.layer.backward(inputs.dy[r], saved))

    check_case(CASE, inputs, cometrt.spawn(fn, 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: (t[0].tolist(), t[1]), "topk_ids must be a numpy.ndarray on device='host'"),
        (lambda t: (t[0].astype(np.int16), t[1]), "topk_ids must have dtype int32 or int64"),
        (lambda t: (t[0][:, :2], t[1]), "topk_ids must have shape (T, 3)"),
        (lambda t: (np.zeros((41, 3), int), t[1]), "topk_ids must have at most max_tokens=40 rows"),
        (lambda t: (t[0], t[1][1:]), "topk_weights must have shape ("),
        (lambda t: (t[0], t[1].astype(float)), "topk_weights must have dtype float32"),
    ],
)
def test_wrong_arguments_of_plan(change, message):
    inputs = make_inputs(CASE)

    def fn(world):
        rank, r = PlanRank(world, CASE, [inputs]), world.rank
        if r == 0:
            with pytest.raises(ValueError, match=re.escape(message)):
                rank.layer.plan(*change((inputs.ids[r], inputs.weights[r])))
        rank.plan(0)
        y, saved = rank.planned_forward(0)
        return Output(y, rank.layer.backward(inputs.dy[r], saved))

    check_case(CASE, inputs, cometrt.spawn(fn, 2))


def test_a_plan_of_another_generation_rank_or_config_is_refused():
    inputs = make_inputs(CASE)

    def fn(world):
        rank = PlanRank(world, CASE, [inputs])
        plans = world.allgather(rank.plan(0), purpose="test")

        def refused(plan, message):
            with pytest.raises(ValueError, match=re.escape(message)):
                rank.planned_forward(0, plan)

        refused(plans[1 - world.rank], f"(rank is {world.rank}, got {1 - world.rank})")
        shape = rank.layer.shape
        # What `tune` does on "cuda" when it changes the number of phases.
        rank.layer.shape = PlanShape(rank.layer.geometry, cometrt.TileConfig(num_phases=1))
        refused(plans[world.rank], "; tune() may change it)")
        rank.layer.shape = shape
        world.reset()
        refused(plans[world.rank], "(generation is 2, got 1; reset() changes it)")
        rank.plan(0)
        y, saved = rank.planned_forward(0)
        return Output(y, rank.layer.backward(inputs.dy[world.rank], saved))

    check_case(CASE, inputs, cometrt.spawn(fn, 2))


# ---- failures -----------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["routing", "capacity"])
def test_plan_raises_what_a_forward_would_and_the_layer_goes_on(fault):
    case = Case((3, 1))
    inputs = make_inputs(case)
    factor = {"routing": 16.0, "capacity": 0.5}[fault]
    spec = cometrt.MoESpec(48, 48, 12, 3, 40, capacity_factor=factor)
    kind = {"routing": cometrt.RoutingError, "capacity": cometrt.CapacityError}[fault]

    def fn(world):
        r = world.rank
        w_up, w_down = cometrt.shard_weights(inputs.w_up, inputs.w_down, r, 3, spec)
        layer = cometrt.MoELayer(world, spec, config=case.config)
        ids, weights = inputs.ids[r].copy(), inputs.weights[r]
        if r == 1:
            ids[3] = [0, 1, 1] if fault == "routing" else ids[3]
            ids[:] = [0, 1, 2] if fault == "capacity" else ids
        errors = [
            caught(layer.plan, ids, weights),
            caught(layer.forward, inputs.x[r], ids, weights, w_up, w_down),
        ]
        layer.synchronize()  # the world has not stopped
        plan = layer.plan(inputs.ids[r][:5], weights[:5])
        y, saved = layer.forward(inputs.x[r][:5], plan=plan, w_up=w_up, w_down=w_down)
        return [(type(e), str(e)) for e in errors], Output(
            y, layer.backward(inputs.dy[r][:5], saved)
        )

    results = cometrt.spawn(fn, 3, timeout_sec=20)
    found = [error for errors, _ in results for error in errors]
    assert len(set(found)) == 1, found
    assert found[0][0] is kind
    for part in (inputs.x, inputs.dy, inputs.ids, inputs.weights):
        part[:] = [array[:5] for array in part]
    check_case(case, inputs, [output for _, output in results])


@pytest.mark.parametrize("other", ["forward", "plan 1", "plan"])
def test_ranks_that_do_not_use_the_same_plan_are_a_mismatch(other):
    batches = batches_of(CASE, 2)

    def fn(world):
        rank = PlanRank(world, CASE, batches)
        rank.plan(0)
        rank.plan(1)
        calls = {
            "forward": lambda: rank.forward(0),
            "plan 1": lambda: rank.planned_forward(1),
            "plan": lambda: rank.plan(0),
        }
        call = calls[other] if world.rank == 1 else lambda: rank.planned_forward(0)
        error = caught(call)
        world.reset()
        rank.plan(0)
        y, saved = rank.planned_forward(0)
        return error, Output(y, rank.layer.backward(batches[0].dy[world.rank], saved))

    results = cometrt.spawn(fn, 2, timeout_sec=5)
    texts = {
        "forward": "rank 1: forward of layer 0",
        "plan 1": "rank 1: planned forward of layer 0 (with the plan of epoch 2)",
        "plan": "rank 1: plan of layer 0",
    }
    for error, _ in results:
        assert isinstance(error, cometrt.MismatchError), error
        assert "rank 0: planned forward of layer 0 (with the plan of epoch 1)" in str(error)
        assert str(error).endswith(texts[other])
    check_case(CASE, batches[0], [output for _, output in results])


def test_a_rank_that_leaves_ends_the_wait_of_a_plan():
    inputs = make_inputs(CASE)

    def fn(world):
        rank = PlanRank(world, CASE, [inputs])
        return None if world.rank else caught(rank.plan, 0)

    error = cometrt.spawn(fn, 2, timeout_sec=0.5)[0]
    assert isinstance(error, cometrt.PeerTimeout), error
    assert "waits for it in layer.plan()" in str(error)
