"""One call of a world at a time: a call that comes during another one has not happened, and the
other one is unharmed; calls from several threads in turn are fine."""

import threading

import numpy as np
import pytest

import cometrt
from tests.cases import Case, Output, check_case, make_inputs
from tests.faults import at
from tests.host.test_failures import caught
from tests.host.test_orders import Rank

CASE = Case((2, 1))


def in_thread(call):
    results = []
    thread = threading.Thread(target=lambda: results.append(caught(call)))
    thread.start()
    thread.join(30)
    assert results, "the call has not ended"
    return results[0]


CALLS = {
    "layer.forward": lambda rank, world: rank.forward(1),
    "layer.backward": lambda rank, world: rank.backward(1),
    "layer.buffer": lambda rank, world: rank.layer.buffer(),
    "layer.synchronize": lambda rank, world: rank.layer.synchronize(),
    "layer.tune": lambda rank, world: rank.layer.tune(),
    "layer.close": lambda rank, world: rank.layer.close(),
    "MoELayer": lambda rank, world: cometrt.MoELayer(world, CASE.spec),
    "world.barrier": lambda rank, world: world.barrier(),
    "world.allgather": lambda rank, world: world.allgather(1),
    "world.reset": lambda rank, world: world.reset(),
    "world.close": lambda rank, world: world.close(),
}
PARTS = ("world.barrier", "world.allgather")  # calls are made of them


@pytest.mark.parametrize("during", ["up", "reduce at home"])
@pytest.mark.parametrize("how", [in_thread, caught], ids=["other thread", "same thread"])
def test_a_call_during_another_one_is_refused(during, how):
    inputs = make_inputs(CASE)

    def fn(world):
        rank, other, errors = Rank(world, CASE, [inputs] * 2), Rank(world, CASE, [inputs] * 2), {}
        rank.forward(1)
        other.forward(1)

        def interfere():
            for subject in (rank, other):  # of one world
                for name, call in CALLS.items():
                    if how is caught and name in PARTS:
                        continue
                    errors[subject, name] = how(lambda c=call, s=subject: c(s, world))

        rank.layer.tracer = at(during, interfere)
        rank.forward(0)
        # In a thread of the call itself, its comm thread, too.
        assert errors
        for (_, name), error in errors.items():
            assert isinstance(error, ValueError), (name, error)
            assert "must be called by one thread at a time" in str(error)
            assert f"{name}() came during layer.forward()" in str(error)
        return rank.backward(0)

    check_case(CASE, inputs, cometrt.spawn(fn, 2, timeout_sec=20))


def test_two_threads_either_get_the_right_y_or_an_error():
    spec = cometrt.MoESpec(64, 64, num_experts=4, topk=2, max_tokens=64, dtype="float32")

    def fn(world):
        rng = np.random.default_rng(0)
        weights = [rng.standard_normal(s, np.float32) for s in ((4, 128, 64), (4, 64, 64))]
        calls, layer = [], cometrt.MoELayer(world, spec)
        for _ in range(2):
            routing = cometrt.router.softmax_topk(rng.standard_normal((64, 4), np.float32), 2)
            calls.append((rng.standard_normal((64, 64), np.float32), *routing, *weights))
        good, outcomes = [layer.forward(*call)[0] for call in calls], []

        def work(index):
            for _ in range(60):
                try:
                    outcomes.append(np.array_equal(layer.forward(*calls[index])[0], good[index]))
                except ValueError as error:
                    outcomes.append("one thread at a time" in str(error))

        threads = [threading.Thread(target=work, args=(index,)) for index in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(outcomes) == 120
        assert all(outcomes)
        assert np.array_equal(layer.forward(*calls[0])[0], good[0])

    cometrt.spawn(fn, ranks=1)


def test_threads_may_take_turns():
    inputs = make_inputs(CASE)

    def fn(world):
        rank, outputs = Rank(world, CASE, [inputs]), []
        assert in_thread(lambda: rank.forward(0)) is None
        assert in_thread(lambda: outputs.append(rank.backward(0))) is None
        assert in_thread(world.barrier) is None
        return outputs[0]

    outputs = cometrt.spawn(fn, 2, timeout_sec=20)
    assert isinstance(outputs[0], Output)
    check_case(CASE, inputs, outputs)
