"""Never a hang, never a wrong y: stalled and raising peers, mismatched calls, bad routing."""

import threading
import time
import types

import ml_dtypes
import numpy as np
import pytest

import cometrt
from cometrt.call_scope import FillingNaN
from cometrt.host import executor
from tests.cases import Case, Output, check_case, make_inputs
from tests.faults import at
from tests.host.test_orders import Rank

CASE = Case((4, 1))
TIMEOUT = 0.6


class Stall:
    """Blocks one rank in the middle until the others have given up."""

    def __init__(self):
        self.over = threading.Event()

    def __call__(self):
        assert self.over.wait(30)


def caught(call, *args, **kwargs) -> BaseException | None:
    try:
        call(*args, **kwargs)
    except Exception as error:
        return error
    return None


def works_again(world, rank) -> Output:
    world.reset()
    rank.layer.tracer = cometrt.trace.NullTracer()
    rank.forward(0)
    return rank.backward(0)


@pytest.mark.parametrize(
    ("where", "call"),
    [
        ("pull", "forward"),
        ("up", "forward"),
        ("down", "forward"),
        ("reduce and push", "forward"),
        ("plan", "forward"),
        ("pull", "backward"),
        ("down dgrad", "backward"),
        ("up dgrad", "backward"),
        ("reduce and push", "backward"),
    ],
)
def test_a_stalled_rank_times_out_on_all_others_and_reset_recovers(where, call):
    inputs, stall, culprit = make_inputs(CASE), Stall(), 2
    gave_up = threading.Barrier(CASE.size - 1, action=stall.over.set)

    def fn(world):
        rank = Rank(world, CASE, [inputs])
        if call == "backward":
            rank.forward(0)
        if world.rank == culprit:
            rank.layer.tracer = at(where, stall)
        begin = time.monotonic()
        error = caught(getattr(rank, call), 0)
        seconds = time.monotonic() - begin
        if world.rank != culprit:
            gave_up.wait(20)
        refused = caught(rank.forward, 0)
        return error, seconds, refused, works_again(world, rank)

    results = cometrt.spawn(fn, CASE.size, timeout_sec=TIMEOUT)
    for rank, (error, seconds, refused, _) in enumerate(results):
        assert isinstance(error, cometrt.PeerTimeout), error
        assert isinstance(refused, cometrt.PeerTimeout), refused
        assert "reset" in str(refused)
        if rank != culprit:
            assert seconds < 4 * TIMEOUT  # several waits may each have used part of a deadline
            assert error.peer == culprit, error
            assert error.epoch == (1 if call == "forward" else 2)
            assert error.tile >= 0 or error.flag == "source_ready", error
            assert f"rank {culprit}" in str(error)
            assert f"epoch {error.epoch}" in str(error)
    check_case(CASE, inputs, [result[-1] for result in results])


@pytest.mark.parametrize(
    ("where", "call"),
    [
        ("pull", "forward"),
        ("up", "forward"),
        ("down", "forward"),
        ("reduce and push", "forward"),
        ("reduce at home", "forward"),
        ("wgrad", "backward"),
        ("reduce and push", "backward"),
    ],
)
def test_a_raising_rank_ends_the_others_at_once(where, call):
    inputs, culprit = make_inputs(CASE), 1

    def fail():
        raise RuntimeError("out of luck")

    def fn(world):
        rank = Rank(world, CASE, [inputs])
        if call == "backward":
            rank.forward(0)
        if world.rank == culprit:
            rank.layer.tracer = at(where, fail)
        error = caught(getattr(rank, call), 0)
        refused = caught(rank.forward, 0)
        # all have seen it before anyone starts to recover
        return error, refused, works_again(world, rank)

    begin = time.monotonic()
    results = cometrt.spawn(fn, CASE.size, timeout_sec=20)
    assert time.monotonic() - begin < 10  # nobody sat out the deadline
    for rank, (error, refused, _) in enumerate(results):
        if rank == culprit:
            assert isinstance(error, RuntimeError)
            assert "out of luck" in str(error)
        elif error is not None:  # a rank that had all it needed has a right answer
            assert isinstance(error, cometrt.PeerTimeout), error
            assert error.peer == error.waiter == culprit
            assert error.tile >= 0
            assert f"rank {culprit} raised RuntimeError in {where} of tile" in str(error)
            assert "epoch" in str(error)
        assert isinstance(refused, cometrt.PeerTimeout)
    check_case(CASE, inputs, [result[-1] for result in results])


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float32])
def test_results_on_a_gpu_become_nan_without_a_kernel(dtype):
    """Loading a kernel may wait for kernels that wait for a peer."""
    values = np.ones(6, dtype)

    def memset_async(byte, nbytes):
        values.view(np.uint8)[:nbytes] = byte

    memory = types.SimpleNamespace(memset_async=memset_async)
    result = types.SimpleNamespace(data=memory, nbytes=values.nbytes)
    with pytest.raises(LookupError), FillingNaN(result):
        raise LookupError
    assert np.isnan(values.astype(np.float32)).all()


def test_a_failed_call_leaves_nan_and_accumulators_alone():
    inputs = make_inputs(CASE)

    def fail():
        raise RuntimeError("out of luck")

    def fn(world):
        rank = Rank(world, CASE, [inputs])
        rank.forward(0)
        rank.layer.tracer = at("reduce at home", fail)
        w_up, w_down = (np.ones_like(w) for w in (rank.w_up, rank.w_down))
        dy = inputs.dy[world.rank]
        out = cometrt.Gradients(
            np.zeros_like(dy), np.zeros(inputs.weights[world.rank].shape, np.float32), w_up, w_down
        )
        assert caught(rank.layer.backward, dy, rank.saved[0], out=out, accumulate=True)
        assert np.isnan(out.x.astype(np.float32)).all()
        assert np.isnan(out.topk_weights).all()
        assert (w_up == 1).all()
        assert (w_down == 1).all()
        world.reset()
        rank.layer.tracer = at("reduce at home", fail)
        y = np.zeros_like(dy)
        tables = inputs.ids[world.rank], inputs.weights[world.rank]
        assert caught(rank.layer.forward, dy, *tables, rank.w_up, rank.w_down, out=y)
        assert np.isnan(y.astype(np.float32)).all()
        world.reset()
        rank.layer.tracer = cometrt.trace.NullTracer()
        return rank.backward(0)  # saved has not been used up by the call that failed

    check_case(CASE, inputs, cometrt.spawn(fn, CASE.size, timeout_sec=20))


def test_a_rank_that_never_calls_times_out_on_the_others():
    inputs, absent = make_inputs(CASE), 3
    gave_up = threading.Barrier(CASE.size)

    def fn(world):
        rank = Rank(world, CASE, [inputs])
        error = None if world.rank == absent else caught(rank.forward, 0)
        gave_up.wait(20)
        return error, works_again(world, rank)

    results = cometrt.spawn(fn, CASE.size, timeout_sec=TIMEOUT)
    for rank, (error, _) in enumerate(results):
        if rank != absent:
            assert isinstance(error, cometrt.PeerTimeout)
            assert (error.flag, error.peer, error.epoch) == ("source_ready", absent, 1)
            assert (error.expected, error.found) == (1, 0)
    check_case(CASE, inputs, [result[-1] for result in results])


def mismatch(call_of):
    """Everyone but rank 0 makes call 0, rank 0 call 1; all get MismatchError, all recover."""
    inputs = make_inputs(CASE)

    def fn(world):
        rank, other = Rank(world, CASE, [inputs] * 2), Rank(world, CASE, [inputs])
        rank.forward(0)
        rank.forward(1)
        error = caught(call_of(rank, other)[world.rank == 0])
        assert isinstance(caught(rank.forward, 0), cometrt.MismatchError)
        return error, works_again(world, rank)

    results = cometrt.spawn(fn, CASE.size, timeout_sec=20)
    for error, _ in results:
        assert isinstance(error, cometrt.MismatchError), error
        assert "rank 0: " in str(error)
        assert "rank 3: " in str(error)
        assert "epoch 3" in str(error)
    check_case(CASE, inputs, [output for _, output in results])


def test_forward_against_backward_is_a_mismatch():
    mismatch(lambda rank, other: (lambda: rank.forward(0), lambda: rank.backward(0)))


def test_backwards_of_different_forwards_are_a_mismatch():
    mismatch(lambda rank, other: (lambda: rank.backward(0), lambda: rank.backward(1)))


def test_different_layers_are_a_mismatch():
    mismatch(lambda rank, other: (lambda: rank.forward(0), lambda: other.forward(0)))


def test_different_collectives_are_a_mismatch():
    def fn(world):
        error = caught(world.barrier if world.rank else lambda: world.allgather(1))
        world.reset()
        assert world.allgather(world.rank) == [0, 1, 2]
        return error

    for error in cometrt.spawn(fn, 3, timeout_sec=20):
        assert isinstance(error, cometrt.MismatchError)
        assert "rank 1: barrier" in str(error)


@pytest.mark.parametrize("where", ["publish", "plan", "pull", "down", "reduce at home"])
def test_spawn_raises_what_a_rank_raised_in_the_middle_of_a_call(where):
    inputs = make_inputs(CASE)

    def fail():
        raise LookupError("mine")

    def fn(world):
        rank = Rank(world, CASE, [inputs])
        if world.rank == 1:
            rank.layer.tracer = at(where, fail)
        rank.forward(0)

    begin = time.monotonic()
    for _ in range(4):
        with pytest.raises(LookupError, match="mine"):
            cometrt.spawn(fn, CASE.size, timeout_sec=20)
    assert time.monotonic() - begin < 10


def test_a_call_that_failed_while_publishing_cannot_be_repeated_out_of_step():
    inputs = make_inputs(CASE)

    def fail():
        raise MemoryError

    def fn(world):
        rank = Rank(world, CASE, [inputs])
        rank.forward(0)
        rank.forward(0)
        world.barrier()  # all have ended: what fails now fails the third call
        if world.rank == 1:
            rank.layer.tracer = at("publish", fail)
        error = caught(rank.forward, 0)
        assert isinstance(error, MemoryError if world.rank == 1 else cometrt.PeerTimeout)
        assert isinstance(caught(rank.forward, 0), cometrt.PeerTimeout)
        return works_again(world, rank)

    check_case(CASE, inputs, cometrt.spawn(fn, CASE.size, timeout_sec=20))


@pytest.mark.parametrize("operation", ["forward", "backward"])
def test_a_rank_without_memory_ends_the_others_at_once(operation, monkeypatch):
    inputs, real = make_inputs(CASE), executor.empty

    def fn(world):
        rank = Rank(world, CASE, [inputs])
        rank.forward(0)
        world.barrier()
        failing = world.rank == 1

        def empty(buffers):
            if threading.current_thread() is thread and failing:
                raise MemoryError
            return real(buffers)

        thread = threading.current_thread()
        if failing:
            monkeypatch.setattr(executor, "empty", empty)
        error = caught(rank.forward if operation == "forward" else rank.backward, 0)
        assert isinstance(error, MemoryError if failing else cometrt.PeerTimeout)
        failing = False
        return works_again(world, rank)

    begin = time.monotonic()
    check_case(CASE, inputs, cometrt.spawn(fn, CASE.size, timeout_sec=20))
    assert time.monotonic() - begin < 10


def test_an_exchange_against_a_collective_is_a_mismatch():
    inputs = make_inputs(CASE)

    def fn(world):
        rank = Rank(world, CASE, [inputs])
        if world.rank == 2:
            error = caught(cometrt.MoELayer, world, CASE.spec)
        else:
            error = caught(rank.forward, 0)
        assert isinstance(error, cometrt.MismatchError), error
        assert "collective" in str(error)
        return works_again(world, rank)

    begin = time.monotonic()
    check_case(CASE, inputs, cometrt.spawn(fn, CASE.size, timeout_sec=20))
    assert time.monotonic() - begin < 10
