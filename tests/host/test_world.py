"""The world itself: what spawn raises, collectives, allocations, reset."""

import threading
import time

import pytest
import threadpoolctl

import cometrt
from cometrt.world.failure import Failure, WaitTarget
from cometrt.world.threads import ThreadWorld, pause_garbage_collector
from tests.cases import Case, check_case, make_inputs
from tests.faults import at
from tests.host.test_failures import CASE, TIMEOUT, caught
from tests.host.test_orders import Rank


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


def test_spawn_raises_what_the_worlds_own_start_raised():
    with pytest.raises(cometrt.PeerTimeout, match="rendezvous"):
        cometrt.spawn(lambda world: world.rank, 8, timeout_sec=1e-6)


def test_a_failed_allocation_is_told_and_recovered_from(monkeypatch):
    inputs, failing = make_inputs(CASE), [True]
    allocate = ThreadWorld.allocate_host

    def fails_once(self, nbytes):
        if self.rank == 1 and self._num_allocations > 1 and failing:
            failing.clear()
            raise MemoryError("no room")
        return allocate(self, nbytes)

    monkeypatch.setattr(ThreadWorld, "allocate_host", fails_once)

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


def test_a_peer_that_went_on_between_two_reads_is_no_mismatch():
    def fn(world):
        values = [0, 1]  # it comes while the waiter looks where it is

        def read():
            return values[0]

        def mismatch():
            values.pop(0)
            return "it has begun the next exchange"

        wanted = WaitTarget("rendezvous", 0, 1)
        world.wait(read, wanted, mismatch=mismatch)
        with pytest.raises(cometrt.MismatchError, match="it has begun"):
            world.wait(lambda: 0, wanted, mismatch=lambda: "it has begun")

    cometrt.spawn(fn, 1)


def test_reset_aligns_sequence_numbers():
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
        generation = int(world.control_block["generation"][0])
        world.reset()
        for control_block in world.control_blocks:  # what a rank that woke up late would write
            control_block["abort"][0] = generation
        world.barrier()
        rank.forward(0)
        return rank.backward(0)

    check_case(CASE, inputs, cometrt.spawn(fn, CASE.size))


def test_kernels_hear_of_a_failure_before_the_hosts():
    def fn(world):
        seen = []

        class Gpu:
            def abort(self, generation):
                seen.append((generation, world.stopped))
                raise LookupError("no GPU")

        world.gpu = Gpu()
        with pytest.raises(LookupError):
            world.stop(Failure("raised", 0, "test"))
        world.gpu = None
        assert seen == [(world.generation, False)]
        assert world.stopped  # hosts wait for nothing either, though the GPU could not be told

    cometrt.spawn(fn, 1)


def test_allgather_takes_values_larger_than_a_mailbox():
    def fn(world):
        big = bytes([world.rank]) * (200_000 if world.rank else 10)
        return [len(value) for value in world.allgather(big)]

    assert cometrt.spawn(fn, 3) == [[10, 200_000, 200_000]] * 3


def test_timeouts_of_a_collective_name_the_missing_rank():
    def fn(world):
        if world.rank != 1:
            with pytest.raises(cometrt.PeerTimeout) as caught_error:
                world.barrier()
            assert (caught_error.value.flag, caught_error.value.peer) == ("rendezvous", 1)
        else:
            time.sleep(3 * TIMEOUT)

    cometrt.spawn(fn, 3, timeout_sec=TIMEOUT)


def test_blas_has_one_thread_while_a_world_is_open_whoever_had_set_it_before():
    def threads(_=None):
        return {library["num_threads"] for library in threadpoolctl.threadpool_info()}

    with threadpoolctl.threadpool_limits(2, user_api="blas"):
        before = threads()
        for _ in range(2):
            assert cometrt.spawn(threads, 2) == [{1}, {1}]
            assert threads() == before


@pytest.mark.parametrize("enabled", [True, False])
def test_the_garbage_collector_is_paused_and_restored(enabled):
    import gc

    before = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        seen = []

        def fails():
            with pause_garbage_collector():
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

    too_many = {"rank": 1, "need": 20, "capacity": 10, "capacity_factor": 2.0}
    wrong = {"rank": 1, "token": 3, "k": 2}
    for error, fields in (
        (cometrt.CapacityError.build(**too_many), too_many),
        (cometrt.RoutingError.build("topk_ids", "must be distinct", **wrong), wrong),
    ):
        copy = pickle.loads(pickle.dumps(error))
        assert (type(copy), str(copy), vars(copy)) == (type(error), str(error), fields)
