"""Never a hang, never a wrong y: stalled and raising peers, mismatched calls, bad routing."""

import threading
import time

import numpy as np
import pytest

import cometrt
from cometrt.world.failure import Wanted
from cometrt.world.threads import ThreadWorld, collector_at_rest
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


def test_meeting_for_different_things_is_a_mismatch():
    def fn(world):
        error = caught(world.barrier if world.rank else lambda: world.allgather(1))
        world.reset()
        assert world.allgather(world.rank) == [0, 1, 2]
        return error

    for error in cometrt.spawn(fn, 3, timeout_sec=20):
        assert isinstance(error, cometrt.MismatchError)
        assert "rank 1: barrier" in str(error)


# ---- routing that is wrong, or too much for the buffers ----------------------------------------


def routing_failure(change, kind, capacity_factor=16.0):
    """Changes rank 1's routing; every rank must raise `kind` with one text and go on living."""
    case, inputs = Case((3, 1)), make_inputs(Case((3, 1)))
    spec = cometrt.MoESpec(
        **{
            name: getattr(case.spec, name)
            for name in ("hidden", "intermediate", "num_experts", "topk", "max_tokens", "dtype")
        },
        capacity_factor=capacity_factor,
    )
    ids, weights = inputs.ids[1].copy(), inputs.weights[1].copy()
    change(ids, weights)

    def fn(world):
        r = world.rank
        w_up, w_down = cometrt.shard_weights(inputs.w_up, inputs.w_down, r, 3, spec)
        layer = cometrt.MoELayer(world, spec, config=case.config)
        y = np.zeros_like(inputs.x[r])
        tables = (ids, weights) if r == 1 else (inputs.ids[r], inputs.weights[r])
        error = caught(layer.forward, inputs.x[r], *tables, w_up, w_down, out=y)
        assert np.isnan(y.astype(np.float32)).all()
        layer.synchronize()  # the world has not stopped
        good, saved = layer.forward(
            inputs.x[r][:5], inputs.ids[r][:5], inputs.weights[r][:5], w_up, w_down
        )
        return error, Output(good, layer.backward(inputs.dy[r][:5], saved))

    results = cometrt.spawn(fn, 3, timeout_sec=20)
    errors = [error for error, _ in results]
    assert {type(error) for error in errors} == {kind}, errors
    assert len({str(error) for error in errors}) == 1
    for part in (inputs.x, inputs.dy, inputs.ids, inputs.weights):
        part[:] = [array[:5] for array in part]
    check_case(case, inputs, [output for _, output in results])
    return errors[0]


def put(table, token, k, value):
    def change(ids, weights):
        (ids if table == "ids" else weights)[token, k] = value

    return change


@pytest.mark.parametrize("value", [12, -2, 2**31 - 1, 2**40, -(2**40)])
def test_an_id_out_of_range(value):
    error = routing_failure(put("ids", 4, 2, value), cometrt.RoutingError)
    assert "topk_ids of rank 1, token 4, k 2 must be in [-1, 12)" in str(error)
    # Ranks see each other's ids as int32.
    shown = {2**31 - 1: "2147483647 or more", 2**40: "2147483647 or more"}
    shown[-(2**40)] = "-2147483648 or less"
    assert f"(got {shown.get(value, value)})" in str(error)


def test_a_repeated_id():
    def change(ids, weights):
        ids[6, 2] = ids[6, 0]

    error = routing_failure(change, cometrt.RoutingError)
    assert "rank 1, token 6, k 2 must be distinct within the token" in str(error)


def test_a_repeated_id_beside_one_beyond_32_bits():
    def change(ids, weights):
        ids[6] = [3, 3, 2**40]

    error = routing_failure(change, cometrt.RoutingError)
    assert "token 6, k 1 must be distinct" in str(error)
    assert "(got 3 again in [3, 3, 2147483647 or more])" in str(error)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite(value):
    error = routing_failure(put("weights", 3, 1, value), cometrt.RoutingError)
    assert "topk_weights of rank 1, token 3, k 1 must be finite" in str(error)
    assert str(value) in str(error)


def test_too_many_rows():
    def change(ids, weights):
        ids[:] = [0, 1, 2]  # rank 1's tokens all go to rank 0

    # Balanced: 3 ranks * 40 tokens * 3 pairs / 3 groups = 120 rows.
    error = routing_failure(change, cometrt.CapacityError, capacity_factor=0.5)
    assert error.capacity == (60 + 4 * 15) // 16 * 16
    assert error.need > error.capacity
    assert error.rank == 0
    assert f"needs {error.need} rows" in str(error)
    assert f"capacity is {error.capacity}" in str(error)
    assert f"({np.ceil(error.need / 1.2) / 100:.2f} is enough)" in str(error)


# ---- the world itself ---------------------------------------------------------------------------


def test_spawn_raises_the_first_original_exception():
    class MyError(Exception):
        pass

    def fn(world):
        if world.rank == 2:
            time.sleep(0.1)
            raise MyError("mine")
        world.barrier()

    begin = time.monotonic()
    with pytest.raises(MyError, match="mine"):
        cometrt.spawn(fn, 4, timeout_sec=20)
    assert time.monotonic() - begin < 10


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


def test_spawn_raises_what_the_worlds_own_start_raised():
    with pytest.raises(cometrt.PeerTimeout, match="rendezvous"):
        cometrt.spawn(lambda world: world.rank, 8, timeout_sec=1e-6)


def test_a_failed_allocation_is_told_and_recovered_from(monkeypatch):
    inputs, failing = make_inputs(CASE), [True]
    allocate = ThreadWorld._allocate

    def fails_once(self, nbytes):
        if self.rank == 1 and self._num_allocations > 1 and failing:
            failing.clear()
            raise MemoryError("no room")
        return allocate(self, nbytes)

    monkeypatch.setattr(ThreadWorld, "_allocate", fails_once)

    def fn(world):
        error = caught(cometrt.MoELayer, world, CASE.spec)
        assert isinstance(error, MemoryError if world.rank == 1 else cometrt.PeerTimeout)
        if world.rank != 1:
            assert "rank 1 raised MemoryError in allocating shared memory" in str(error)
        world.reset()
        rank = Rank(world, CASE, [inputs])
        rank.forward(0)
        return rank.backward(0)

    check_case(CASE, inputs, cometrt.spawn(fn, CASE.size, timeout_sec=20))


def test_an_exchange_against_a_meeting_is_a_mismatch():
    inputs = make_inputs(CASE)

    def fn(world):
        rank = Rank(world, CASE, [inputs])
        if world.rank == 2:
            error = caught(cometrt.MoELayer, world, CASE.spec)
        else:
            error = caught(rank.forward, 0)
        assert isinstance(error, cometrt.MismatchError), error
        assert "meeting" in str(error)
        return works_again(world, rank)

    begin = time.monotonic()
    check_case(CASE, inputs, cometrt.spawn(fn, CASE.size, timeout_sec=20))
    assert time.monotonic() - begin < 10


def test_a_peer_that_went_on_between_two_reads_is_not_misplaced():
    def fn(world):
        values = [0, 1]  # it comes while the waiter looks where it is

        def read():
            return values[0]

        def misplaced():
            values.pop(0)
            return "it has begun the next exchange"

        wanted = Wanted("rendezvous", 0, 1)
        world.wait(read, wanted, misplaced=misplaced)
        with pytest.raises(cometrt.MismatchError, match="it has begun"):
            world.wait(lambda: 0, wanted, misplaced=lambda: "it has begun")

    cometrt.spawn(fn, 1)


def test_reset_brings_meetings_back_into_step():
    def fn(world):
        if world.rank != 1:
            with pytest.raises(cometrt.PeerTimeout, match="rendezvous from rank 1"):
                world.barrier()
        world.timeout_sec = 20.0
        world.reset()
        for value in range(3):
            assert world.allgather((value, world.rank)) == [(value, r) for r in range(3)]

    cometrt.spawn(fn, 3, timeout_sec=TIMEOUT)


def test_ctrl_c_ends_the_whole_call():
    import _thread

    inputs = make_inputs(Case((1, 1)))
    reached, interrupted = threading.Event(), threading.Event()

    def interrupt():
        assert reached.wait(20)
        _thread.interrupt_main()
        interrupted.set()

    def linger():
        reached.set()
        assert interrupted.wait(20)
        time.sleep(1.0)

    def fn(world):
        rank = Rank(world, Case((1, 1)), [inputs])
        rank.layer.tracer = at("reduce at home", linger)
        rank.forward(0)

    # spawn joins the rank's thread here, in the main thread, which gets the interrupt.
    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        cometrt.spawn(fn, 1)
    deadline = time.monotonic() + 10
    while any(t.name.startswith("cometrt-") for t in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_reset_without_a_peer_times_out_and_may_be_tried_again():
    lonely = threading.Event()

    def fn(world):
        if world.rank == 0:
            with pytest.raises(cometrt.PeerTimeout, match="reset from rank 1"):
                world.reset()
            lonely.set()
        else:
            assert lonely.wait(20)
        world.reset()
        world.barrier()
        return world.allgather(world.rank)

    assert cometrt.spawn(fn, 2, timeout_sec=TIMEOUT) == [[0, 1]] * 2


def test_a_failure_from_before_a_reset_cannot_stop_the_world_after_it():
    inputs = make_inputs(CASE)

    def fn(world):
        rank = Rank(world, CASE, [inputs])
        generation = int(world.board["generation"][0])
        world.reset()
        for board in world.boards:  # what a rank that woke up late would write
            board["abort"][0] = generation
        world.barrier()
        rank.forward(0)
        return rank.backward(0)

    check_case(CASE, inputs, cometrt.spawn(fn, CASE.size))


def test_allgather_takes_values_larger_than_a_mailbox():
    def fn(world):
        big = bytes([world.rank]) * (200_000 if world.rank else 10)
        return [len(value) for value in world.allgather(big)]

    assert cometrt.spawn(fn, 3) == [[10, 200_000, 200_000]] * 3


def test_timeouts_of_a_meeting_name_who_is_missing():
    def fn(world):
        if world.rank != 1:
            with pytest.raises(cometrt.PeerTimeout) as caught_error:
                world.barrier()
            assert (caught_error.value.flag, caught_error.value.peer) == ("rendezvous", 1)
        else:
            time.sleep(3 * TIMEOUT)

    cometrt.spawn(fn, 3, timeout_sec=TIMEOUT)


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_rests_and_is_put_back(enabled):
    import gc

    before = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        seen = []

        def fails():
            with collector_at_rest():
                seen.append(gc.isenabled())
                raise KeyError

        with pytest.raises(KeyError):
            fails()
        assert seen == [False]
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if before else gc.disable)()


def test_errors_survive_pickling():
    import pickle

    error = cometrt.CapacityError.build(rank=1, need=20, capacity=10, enough=2.0)
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.need, copy.rank) == (str(error), 20, 1)
