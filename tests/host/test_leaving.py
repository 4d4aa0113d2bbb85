"""Ranks that close, leave, reset or get stuck while others wait: said at once, in a user's words,
and never a hang. An orderly close, however unpunctual, is no fault."""

import os
import random
import sys
import threading
import time

import pytest

import cometrt
from cometrt.world.peer_status import ordinal
from tests.cases import Case, check_case, make_inputs
from tests.faults import at, jitter
from tests.host.test_failures import caught, works_again
from tests.host.test_orders import Rank

CASE = Case((3, 1))


def at_once(fn, ranks=3, timeout_sec=20, seconds=8):
    begin = time.monotonic()
    try:
        return cometrt.spawn(fn, ranks, timeout_sec=timeout_sec)
    finally:
        assert time.monotonic() - begin < seconds  # nobody sat out a deadline


# ---- another number of calls --------------------------------------------------------------------


@pytest.mark.parametrize("calls", [0, 1, 9])
def test_a_rank_that_has_closed_is_named_with_its_calls(calls):
    inputs = make_inputs(CASE)

    def fn(world):
        rank = Rank(world, CASE, [inputs])
        for _ in range(calls):
            rank.forward(0)
        world.barrier()  # else another rank's failure may end a call that is still under way
        if world.rank == 0:
            return None
        error = caught(rank.forward, 0)
        assert isinstance(error, cometrt.PeerTimeout)
        return error

    plural = "" if calls == 1 else "s"
    for error in at_once(fn)[1:]:
        assert f"rank 0 has closed the world after {calls} call{plural}; " in str(error)
        assert f" is in its {ordinal(calls + 1)} call" in str(error)
        assert error.peer == 0


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("world.barrier", lambda world: world.barrier()),
        ("world.allgather", lambda world: world.allgather(1)),
        ("MoELayer", lambda world: cometrt.MoELayer(world, CASE.spec)),
        ("world.reset", lambda world: world.reset()),
    ],
)
def test_a_collective_without_a_rank_that_has_closed(name, call):
    def fn(world):
        if world.rank != 2:
            # Who has raised closes too: after reset, which stops nothing, another one may see that.
            closed = r"rank . has closed" if name == "world.reset" else r"rank 2 has closed"
            with pytest.raises(cometrt.PeerTimeout, match=closed) as error:
                call(world)
            assert "the world after 0 calls" in str(error.value)
            assert f"waits for it in {name}()" in str(error.value)

    at_once(fn)


def test_a_rank_that_waits_says_how_the_other_went_elsewhere():
    inputs = make_inputs(CASE)

    def fn(world):
        rank = Rank(world, CASE, [inputs])
        for _ in range(2):
            rank.forward(0)
        world.barrier()
        error = caught(world.barrier if world.rank == 1 else lambda: rank.forward(0))
        assert isinstance(error, cometrt.MismatchError)
        world.reset()
        return str(error)

    for text in at_once(fn):
        assert "rank 1 called a collective" in text or "began its 3rd call while" in text


def test_a_plain_timeout_hints_at_timeout_sec():
    def fn(world):
        if world.rank == 1:
            time.sleep(0.8)
        else:
            with pytest.raises(cometrt.PeerTimeout, match="only slow needs a longer timeout_sec"):
                world.barrier()

    at_once(fn, ranks=2, timeout_sec=0.3)


def test_an_orderly_close_never_stops_anything():
    inputs, rng = make_inputs(CASE), random.Random(0)

    def fn(world):
        rank = Rank(world, CASE, [inputs], jitter(world.rank, 0.002))
        for _ in range(3):
            rank.forward(0)
        output = rank.backward(0)
        time.sleep(rng.random() * 0.01)
        return output

    for _ in range(15):
        check_case(CASE, inputs, at_once(fn))


@pytest.mark.parametrize("culprit", [0, 2])
def test_reset_of_a_running_world_by_all_ranks_is_orderly_too(culprit):
    inputs = make_inputs(CASE)

    def fn(world):
        slow = jitter(world.rank, 0.005) if world.rank == culprit else None
        rank = Rank(world, CASE, [inputs], slow)
        for _ in range(20):
            rank.forward(0)
            world.reset()
        return rank.backward(0)

    check_case(CASE, inputs, at_once(fn, seconds=30))


# ---- reset by the rank that failed --------------------------------------------------------------


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("where", ["before a call", "after a call", "before a collective"])
def test_reset_by_the_rank_that_failed_wakes_the_others_at_once(ranks, where):
    case = Case((ranks, 1))
    inputs = make_inputs(case)

    def fn(world):
        rank = Rank(world, case, [inputs])
        for turn in range(10):
            try:
                if where == "after a call":
                    rank.forward(0)
                if world.rank == turn % ranks:
                    raise KeyError("own fault")
                if where == "before a collective":
                    world.barrier()
                rank.forward(0)
            except (KeyError, cometrt.CometError):
                world.reset()
            else:
                raise AssertionError("it went on without a rank")
        return works_again(world, rank)

    check_case(case, inputs, at_once(fn, ranks))


# ---- exits --------------------------------------------------------------------------------------


def test_a_rank_that_exits_says_so():
    def fn(world):
        if world.rank == 1:
            sys.exit(0)
        error = caught(world.barrier)
        assert "rank 1 exited (SystemExit: 0)" in str(error)
        raise error

    with pytest.raises(SystemExit):
        at_once(fn)


def test_ctrl_c_in_a_wait_is_no_failed_wait():
    inputs = make_inputs(CASE)

    def interrupt():
        raise KeyboardInterrupt

    def fn(world):
        rank = Rank(world, CASE, [inputs])
        if world.rank == 1:
            rank.layer.tracer = at("wait", interrupt)
        try:
            rank.forward(0)
        except KeyboardInterrupt:
            assert world.rank == 1
        except cometrt.PeerTimeout as error:
            return str(error)
        return str(caught(rank.forward, 0))

    for text in at_once(fn):
        assert "rank 1 exited (KeyboardInterrupt)" in text
        assert "wait" not in text.replace("waits", "")


# ---- stuck --------------------------------------------------------------------------------------


@pytest.fixture
def release():
    """What a rank is stuck in, until the test is over."""
    event = threading.Event()
    yield event
    event.set()


def left_behind():
    return [t for t in threading.enumerate() if t.name.startswith("left behind: cometrt-rank")]


def test_spawn_leaves_a_stuck_rank_behind(release):
    worlds = []

    def fn(world):
        worlds.append(world)
        if world.rank == 1:
            release.wait(60)
        world.barrier()

    begin = time.monotonic()
    with pytest.raises(cometrt.PeerTimeout, match="rendezvous from rank 1") as error:
        cometrt.spawn(fn, 3, timeout_sec=0.5)
    assert 2 < time.monotonic() - begin < 6
    assert any("ranks [1] have not ended" in note for note in error.value.__notes__)
    (thread,) = left_behind()
    assert thread.daemon
    release.set()  # it can do nothing more with its world
    thread.join(10)
    assert not thread.is_alive()
    assert all(isinstance(caught(world.barrier), ValueError) for world in worlds)


def test_a_rank_that_is_only_slower_than_one_that_raised_is_waited_for():
    done = []

    def fn(world):
        if world.rank == 0:
            raise KeyError("mine")
        time.sleep(1.0)
        done.append(world.rank)

    with pytest.raises(KeyError, match="mine"):
        cometrt.spawn(fn, 2, timeout_sec=0.1)
    assert done == [1]


def test_without_an_error_nobody_is_left_behind():
    def fn(world):
        time.sleep(3.0 if world.rank else 0)
        return world.rank

    assert cometrt.spawn(fn, 2, timeout_sec=0.1) == [0, 1]


def test_ctrl_c_leaves_a_stuck_rank_behind(release):
    import _thread

    reached = threading.Event()

    def fn(world):
        reached.set()
        release.wait(60)

    def interrupt():
        assert reached.wait(20)
        _thread.interrupt_main()

    threading.Thread(target=interrupt).start()
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        cometrt.spawn(fn, 2)
    assert time.monotonic() - begin < 5
    release.set()
    deadline = time.monotonic() + 10
    while any(t.name.startswith("cometrt-") for t in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.02)


# ---- a child of fork ----------------------------------------------------------------------------


def test_a_forked_child_cannot_use_its_parents_world():
    inputs = make_inputs(Case((1, 1)))

    def in_child(world, rank):
        calls = [
            lambda: rank.forward(0),
            rank.layer.buffer,
            rank.layer.synchronize,
            world.barrier,
            world.reset,
            lambda: cometrt.MoELayer(world, Case((1, 1)).spec),
        ]
        for call in calls:
            error = caught(call)
            if not isinstance(error, ValueError) or "child of os.fork()" not in str(error):
                return 1
        rank.layer.close()
        world.close()
        with world:
            pass
        return 0

    def fn(world):
        rank = Rank(world, Case((1, 1)), [inputs])
        child = os.fork()
        if child == 0:
            os._exit(in_child(world, rank))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        rank.forward(0)
        return rank.backward(0)

    check_case(Case((1, 1)), inputs, cometrt.spawn(fn, 1))
