"""Calls in a row: slow ranks, any order of micro-batches, ranks that never exchange a token.

A stale read or an early overwrite would give another answer than the same call made alone.
"""

import time

import numpy as np
import pytest

import cometrt
from tests.cases import Case, Inputs, Output, check_case, make_inputs, run_case
from tests.faults import at, jitter, slow


class Rank:
    """One rank with a layer; runs forward and backward of numbered micro-batches."""

    def __init__(self, world, case, batches: list[Inputs], tracer=None):
        self.rank, self.batches, self.saved, self.y = world.rank, batches, {}, {}
        self.layer = cometrt.MoELayer(world, case.spec, case.mode, config=case.config)
        if tracer is not None:
            self.layer.tracer = tracer
        self.w_up, self.w_down = cometrt.shard_weights(
            batches[0].w_up, batches[0].w_down, world.rank, world.size, case.spec
        )

    def forward(self, batch: int) -> None:
        inputs, r = self.batches[batch], self.rank
        self.y[batch], self.saved[batch] = self.layer.forward(
            inputs.x[r], inputs.ids[r], inputs.weights[r], self.w_up, self.w_down
        )

    def backward(self, batch: int) -> Output:
        grads = self.layer.backward(self.batches[batch].dy[self.rank], self.saved[batch])
        return Output(self.y[batch], grads)


def batches_of(case: Case, count: int, routings=("uniform",)) -> list[Inputs]:
    """Micro-batches with different tokens and routing and the same weights."""
    batches = []
    for index in range(count):
        batch = make_inputs(
            Case(case.ranks, routings[index % len(routings)], seed=case.seed + index)
        )
        if batches:
            batch.w_up, batch.w_down = batches[0].w_up, batches[0].w_down
        batches.append(batch)
    return batches


def run_orders(case, batches, order, tracers=lambda rank: None):
    """`order` is a string like "f0 f1 b1 b0"; checks every micro-batch against the reference."""
    steps = [(step[0], int(step[1:])) for step in order.split()]

    def fn(world):
        rank, outputs = Rank(world, case, batches, tracers(world.rank)), {}
        for kind, batch in steps:
            if kind == "f":
                rank.forward(batch)
            else:
                outputs[batch] = rank.backward(batch)
        return outputs

    results = cometrt.spawn(fn, case.size, timeout_sec=60)
    for batch in results[0]:
        check_case(case, batches[batch], [outputs[batch] for outputs in results])
    return results


@pytest.mark.parametrize("save", ["rows", "z", "nothing"])
@pytest.mark.parametrize("ranks", [(4, 1), (4, 2)], ids=str)
@pytest.mark.parametrize("slow_rank", [0, 3])
def test_six_calls_in_a_row_with_one_slow_rank(ranks, save, slow_rank):
    case = Case(ranks, save=save)
    run_orders(
        case,
        batches_of(case, 6, ("uniform", "skewed")),
        "f0 f1 f2 f3 f4 f5 b0 b1 b2 b3 b4 b5",
        lambda rank: slow(0.002) if rank == slow_rank else None,
    )


@pytest.mark.parametrize(
    "order",
    ["f0 f1 b0 b1", "f0 f1 b1 b0", "f0 b0 f1 b1", "f0 f1 b0 f2 b2 b1", "f0 f1 f2 b1 b2 b0"],
)
@pytest.mark.parametrize("save", ["rows", "z", "nothing"])
def test_any_order_of_micro_batches(order, save):
    case = Case((3, 1), save=save)
    run_orders(case, batches_of(case, 3), order)


@pytest.mark.parametrize("order", ["f0 f1 b1 b0", "f0 b0 f1 b1 f2 b2"])
@pytest.mark.parametrize("save", ["rows", "z", "nothing"])
def test_ranks_that_never_exchange_a_token(order, save):
    # Nobody's partials hold anybody back: only source_ready keeps ranks within one epoch.
    case = Case((4, 1), "at_home", save=save)
    run_orders(
        case,
        batches_of(case, 3, ("at_home", "uniform", "at_home")),
        order,
        lambda rank: slow(0.003) if rank == 2 else None,
    )


def test_a_rank_that_plans_late_reads_the_tables_of_its_own_epoch():
    # The others have published the next epoch when rank 2 begins to read this one's.
    case = Case((4, 1), "at_home")
    run_orders(
        case,
        batches_of(case, 3, ("at_home", "uniform", "at_home")),
        "f0 f1 f2 b2 b1 b0",
        lambda rank: at("plan", lambda: time.sleep(0.5), always=True) if rank == 2 else None,
    )


@pytest.mark.parametrize("seed", range(4))
def test_random_delays_do_not_change_a_bit(seed):
    ranks = [(4, 1), (4, 2), (3, 3), (5, 1)][seed]
    save, order = ["rows", "z", "nothing"][seed % 3], ["phases", "columns"][seed // 2]
    case = Case(ranks, save=save, order=order)
    batches, order = batches_of(case, 2, ("skewed", "one_token")), "f0 f1 b0 b1"
    calm = run_orders(case, batches, order)
    late = run_orders(case, batches, order, lambda rank: jitter(10 * seed + rank, 0.004))
    for before, after in zip(calm, late, strict=True):
        assert {b: o.digest() for b, o in before.items()} == {
            b: o.digest() for b, o in after.items()
        }


def test_layers_of_different_shape_share_the_heap():
    small, large = Case((4, 1)), Case((4, 1), shard_columns=80, dtype="float32", order="columns")
    inputs = {case: make_inputs(case) for case in (small, large)}

    def fn(world):
        first = Rank(world, small, [inputs[small]])
        first.forward(0)
        second = Rank(world, large, [inputs[large]])  # the heap grows under the first layer
        second.forward(0)
        outputs = {small: first.backward(0), large: second.backward(0)}
        first.forward(0)
        assert first.backward(0).digest() == outputs[small].digest()
        return outputs

    results = cometrt.spawn(fn, 4)
    for case in (small, large):
        check_case(case, inputs[case], [outputs[case] for outputs in results])


def test_a_rank_that_plans_late_is_not_overtaken_by_another_layer():
    # Rank 2 still reads this epoch's tables when the others, who need nothing of it, publish the
    # next one's, of a layer with other places in the heap.
    small, large = Case((4, 1), "at_home"), Case((4, 1), dtype="float32", order="columns")
    inputs = {case: make_inputs(case) for case in (small, large)}

    def fn(world):
        late = at("plan", lambda: time.sleep(0.5)) if world.rank == 2 else None
        first, second = (
            Rank(world, small, [inputs[small]], late),
            Rank(world, large, [inputs[large]]),
        )
        second.forward(0)
        first.forward(0)
        grads = second.backward(0)
        return {small: first.backward(0), large: grads}

    results = cometrt.spawn(fn, 4, timeout_sec=5)
    for case in (small, large):
        check_case(case, inputs[case], [outputs[case] for outputs in results])


@pytest.mark.parametrize("save", ["rows", "z", "nothing"])
def test_x_in_the_heap_is_used_in_place_and_may_be_the_output(save):
    case = Case((4, 1), save=save)
    inputs = make_inputs(case)
    expected = cometrt.spawn(lambda world: run_case(world, case, inputs, 1), 4)

    def fn(world):
        rank = Rank(world, case, [inputs])
        x = rank.layer.buffer()[: len(inputs.x[world.rank])]
        x[:] = inputs.x[world.rank]
        tables = inputs.ids[world.rank], inputs.weights[world.rank]
        y, saved = rank.layer.forward(x, *tables, rank.w_up, rank.w_down, out=x)
        assert y is x
        return Output(y.copy(), rank.layer.backward(inputs.dy[world.rank], saved))

    for output, other in zip(cometrt.spawn(fn, 4), expected, strict=True):
        assert output.digest() == other.digest()


@pytest.mark.parametrize("save", ["rows", "z", "nothing"])
def test_inputs_may_be_overwritten_after_forward(save):
    case = Case((4, 1), save=save)
    inputs, kept = make_inputs(case), make_inputs(case)

    def fn(world):
        rank = Rank(world, case, [inputs])
        rank.forward(0)
        for array in (inputs.x, inputs.ids, inputs.weights):
            array[world.rank].fill(3)
        return rank.backward(0)

    check_case(case, kept, cometrt.spawn(fn, 4))


@pytest.mark.parametrize("wide", [False, True], ids=["spec dtype", "float32"])
def test_accumulate_adds_weight_gradients_only(wide):
    case = Case((2, 1))
    inputs = make_inputs(case)

    def fn(world):
        rank = Rank(world, case, [inputs])
        rank.forward(0)
        once = rank.backward(0).grads
        dtype = np.float32 if wide else once.w_up.dtype
        start = [np.ones(g.shape, dtype) for g in (once.w_up, once.w_down)]
        rank.forward(0)
        out = cometrt.Gradients(None, None, *(s.copy() for s in start))
        twice = rank.layer.backward(inputs.dy[world.rank], rank.saved[0], out=out, accumulate=True)
        assert twice.w_up is out.w_up
        assert twice.w_down is out.w_down
        assert twice.x.tobytes() == once.x.tobytes()
        assert twice.topk_weights.tobytes() == once.topk_weights.tobytes()
        for total, first, single in zip(twice[2:], start, once[2:], strict=True):
            expected = first.astype(np.float64) + single.astype(np.float64)
            np.testing.assert_allclose(total.astype(np.float64), expected, rtol=1e-2, atol=1e-2)

    cometrt.spawn(fn, 2)
