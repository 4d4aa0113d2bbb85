"""layer.stats() on the host, and how the host reads what the device writes."""

import time

import numpy as np
import pytest

import cometrt
from cometrt.cuda import stats
from cometrt.host import comm
from cometrt.kernels.params import call_stats_dtype
from cometrt.stats import LayerStats, sum_stats
from tests.cases import Case, make_inputs
from tests.host.test_orders import Rank
from tests.stats_cases import check_stats


@pytest.mark.parametrize(
    "case",
    [Case((4, 1)), Case((2, 2), mode="sequential"), Case((4, 1), "one_expert"), Case((1, 1))],
    ids=str,
)
def test_stats_are_those_of_the_newest_call(case):
    check_stats(case, "host")


def test_ranks_wait_for_the_last_one_to_begin():
    case = Case((2, 1))
    inputs = make_inputs(case)

    def fn(world):
        rank = Rank(world, case, [inputs])
        rank.forward(0)
        world.barrier()
        if world.rank == 1:
            time.sleep(0.2)
        rank.forward(0)
        return rank.layer.stats().waited_us

    early, late = cometrt.spawn(fn, 2)
    assert early >= 1e5
    assert late < early


@pytest.mark.parametrize("mode", ["fused", "sequential"])
def test_gemms_of_mode_fused_wait_for_rows_that_are_late(monkeypatch, mode):
    case = Case((2, 1), mode=mode)
    inputs, pull = make_inputs(case), comm.pull_rows

    def late(*arguments):
        time.sleep(0.2)
        pull(*arguments)

    monkeypatch.setattr(comm, "pull_rows", late)

    def fn(world):
        rank = Rank(world, case, [inputs])
        rank.forward(0)
        return rank.layer.stats().rows_waited_us

    waited_us = cometrt.spawn(fn, 2)
    if mode == "sequential":
        assert waited_us == [0, 0]
    else:
        assert all(1e5 < of < 1e7 for of in waited_us)


def test_a_failed_call_leaves_the_stats_of_the_one_before():
    case = Case((2, 1))
    inputs = make_inputs(case)

    def fn(world):
        rank = Rank(world, case, [inputs])
        rank.forward(0)
        before = rank.layer.stats()
        inputs_of_rank = inputs.x[world.rank], inputs.ids[world.rank].copy()
        inputs_of_rank[1][0, 0] = case.spec.num_experts
        with pytest.raises(cometrt.RoutingError):
            rank.layer.forward(*inputs_of_rank, inputs.weights[world.rank], rank.w_up, rank.w_down)
        return before is rank.layer.stats()

    assert cometrt.spawn(fn, 2) == [True, True]


def test_a_closed_layer_has_no_stats():
    def fn(world):
        rank = Rank(world, Case((1, 1)), [make_inputs(Case((1, 1)))])
        rank.layer.close()
        with pytest.raises(ValueError, match="closed"):
            rank.layer.stats()

    cometrt.spawn(fn, 1)


def test_stats_of_a_call_in_slices_are_sums():
    slices = [LayerStats(7, np.array([1, 2]), 0.5, 8.0), LayerStats(8, np.array([4, 0]), 2.0, 0.25)]
    whole = sum_stats(slices)
    assert (whole.epoch, whole.rows.tolist()) == (8, [5, 2])
    assert (whole.waited_us, whole.rows_waited_us) == (2.5, 8.25)


class Words:
    """Memory that a device writes to between two reads, word by word.

    A copy of it as structs would read all values first, and then all epochs.
    """

    def __init__(self, *states):
        self.states = [np.array(of, call_stats_dtype).view(np.uint64) for of in states]
        self.ctypes = self.states[0].ctypes

    def view(self, dtype):
        assert dtype is np.uint64
        return self

    def copy(self):
        return self.states.pop(0) if len(self.states) > 1 else self.states[0]


def words(epoch, waited_us, *rows, rows_waited_us=0.0):
    waits = np.array([waited_us, rows_waited_us], np.float32).view(np.uint32).tolist()
    return [(value, epoch) for value in (*waits, *rows)]


def read(monkeypatch, *states, row_sets=1):
    memory = Words(*states)
    monkeypatch.setattr(stats, "pinned", lambda dtype, count: memory)
    return stats.DeviceStats(len(states[0]) - 2, row_sets)


def test_words_of_one_call_are_read(monkeypatch):
    assert read(monkeypatch, words(0, 0, 0, 0)).read() is None
    found = read(monkeypatch, words(7, 12.5, 3, 4, rows_waited_us=2.5)).read()
    assert (found.epoch, found.waited_us, found.rows.tolist()) == (7, 12.5, [3, 4])
    assert found.rows_waited_us == 2.5


def test_rows_of_an_expert_are_those_of_all_row_sets(monkeypatch):
    largest = 2**31 - 1
    found = read(monkeypatch, words(7, 12.5, 3, largest, 0, 1, 20, largest), row_sets=3).read()
    assert found.rows.dtype == np.int64
    assert (found.epoch, found.rows.tolist()) == (7, [23, 2 * largest + 1])


def test_words_of_two_calls_are_read_again(monkeypatch):
    torn = words(8, 1.0, 5, 6)[:2] + words(7, 12.5, 3, 4)[2:]
    found = read(monkeypatch, torn, words(8, 1.0, 5, 6)).read()
    assert (found.epoch, found.rows.tolist()) == (8, [5, 6])
    device = read(monkeypatch, words(7, 12.5, 3, 4), torn)
    assert device.read().epoch == device.read().epoch == 7
