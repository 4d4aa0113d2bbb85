"""The rank side of test_life.py: the life of worlds under mpirun, in one launch."""

from __future__ import annotations

import errno
import gc
import os
import time
from pathlib import Path

from mpi4py import MPI

import cometrt
from cometrt.world import shared
from cometrt.world.room import Room
from tests.cases import Case, check_case, make_inputs
from tests.host.test_failures import caught
from tests.host.test_orders import Rank
from tests.multi.aborting import aborting

SIZE = 3
CASE = Case((SIZE, 1))
INPUTS = make_inputs(CASE)


def connect(timeout_sec=30.0):
    return cometrt.connect(MPI.COMM_WORLD, device="host", timeout_sec=timeout_sec)


def works(world, rank):
    rank.forward(0)
    outputs = world.allgather(rank.backward(0))
    if world.rank == 0:
        check_case(CASE, INPUTS, outputs)


def mapped_bytes() -> int:
    """Of this process's shared memory."""
    total = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        if "memfd:cometrt" in line:
            begin, end = (int(address, 16) for address in line.split()[0].split("-"))
            total += end - begin
    return total


def another_number_of_calls():
    """Rank 0 closes after two calls: said at once to those in their third, and to rank 0."""
    world, begin = connect(), time.monotonic()
    rank = Rank(world, CASE, [INPUTS])
    rank.forward(0)
    rank.forward(0)
    world.barrier()
    if world.rank == 0:
        error = caught(world.close)
        assert "left without closing: rank 0 has closed the world after 2 calls" in str(error)
    else:
        error = caught(rank.forward, 0)
        assert "rank 0 has closed the world after 2 calls; " in str(error)
        assert "is in its 3rd call" in str(error)
        world.abandon(error)
    assert isinstance(error, cometrt.PeerTimeout)
    assert time.monotonic() - begin < 10


def a_late_close():
    """Who gave up has closed, and so has who came too late: all are told, none waits."""
    world = connect(timeout_sec=0.5)
    if world.rank == 1:
        time.sleep(1.5)
    error = caught(world.close)
    assert isinstance(error, cometrt.PeerTimeout), error
    assert "for close from rank 1" in str(error), error
    assert caught(world.close) is None


def reset_by_the_rank_that_failed():
    with connect() as world:
        rank, begin = Rank(world, CASE, [INPUTS]), time.monotonic()
        for turn in range(20):
            try:
                if world.rank == turn % SIZE:
                    raise KeyError("own fault")
                rank.forward(0)
            except (KeyError, cometrt.CometError):
                world.reset()
        works(world, rank)
        assert time.monotonic() - begin < 10


def a_forked_child():
    with connect() as world:
        rank = Rank(world, CASE, [INPUTS])
        child = os.fork()
        if child == 0:
            used = caught(rank.forward, 0), caught(world.barrier), caught(world.reset)
            try:
                with world:
                    raise LookupError("only the child's")
            except LookupError:
                pass
            right = all(isinstance(error, ValueError) for error in used)
            del world, rank
            gc.collect()
            os._exit(0 if right else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        works(world, rank)


def a_view_outlives_its_world():
    with connect() as world:
        layer = cometrt.MoELayer(world, CASE.spec)
        view = layer.buffer()[3:5]
        view[...] = 7
    del layer
    gc.collect()
    assert (view == 7).all()
    view[...] = 8


def memory_is_given_back():
    large = cometrt.MoESpec(1024, 64, num_experts=3, topk=2, max_tokens=2048, dtype="float32")
    before = mapped_bytes()
    with connect() as world:
        rank = Rank(world, CASE, [INPUTS])
        small = mapped_bytes()
        with cometrt.MoELayer(world, large):
            grown = mapped_bytes()
            assert grown - small > SIZE * 2 * 8 << 20  # x and dy of all ranks
            works(world, rank)
        assert mapped_bytes() == grown
        works(world, rank)
        layer = cometrt.MoELayer(world, CASE.spec, config=CASE.config)
        assert mapped_bytes() == small
        works(world, rank)
        del rank, layer
    del world
    gc.collect()
    assert mapped_bytes() == before


def no_memory_on_one_rank():
    """Told on all ranks alike; after a reset the world goes on."""

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with connect() as world:
        allocate = shared.os.posix_fallocate
        if world.rank == 1:
            shared.os.posix_fallocate = fail
        error = caught(cometrt.MoELayer, world, CASE.spec)
        shared.os.posix_fallocate = allocate
        assert isinstance(error, cometrt.CometError)
        assert "of shared memory: [Errno 28] No space left on device [rank 1]" in str(error)
        world.reset()
        works(world, Rank(world, CASE, [INPUTS]))


def little_room():
    """What all ranks need together is compared with the least that any of them finds."""
    from cometrt import memory

    with connect() as world:
        found = memory.host_room()
        control_block = world.control_block.dtype.itemsize
        needed = CASE.spec.memory(SIZE, device="host", config=CASE.config).heap - control_block
        few = Room("this host", int(2.5 * needed), found.total)
        memory.host_room = lambda: few if world.rank == 2 else found
        error = caught(cometrt.MoELayer, world, CASE.spec, config=CASE.config)
        memory.host_room = lambda: found
        assert isinstance(error, cometrt.CometError)
        assert f"takes {SIZE * needed:,} bytes on the {SIZE} ranks of this host" in str(error)
        assert f"{few.available:,} are available" in str(error)
        assert "max_tokens=40, hidden=48" in str(error)
        assert len(set(world.allgather(str(error)))) == 1
        works(world, Rank(world, CASE, [INPUTS]))


class Gpu:
    """Stands for the world's device memory when it closes."""

    def __init__(self, epochs, fails=False):
        self._epochs, self._fails, self.closed = epochs, fails, False

    def drain(self):
        pass

    def abort(self, generation):
        pass

    def read_epochs(self, ranks):
        return [self._epochs[rank] for rank in ranks]

    def close_peers(self):
        if self._fails:
            raise RuntimeError("cannot close")

    def close(self):
        self.closed = True


def device_memory_that_one_rank_cannot_let_go():
    """Nobody frees what a peer may still have open, and nobody waits for it."""
    world, begin = connect(), time.monotonic()
    world.gpu = Gpu([5] * SIZE, fails=world.rank == 1)
    error = caught(world.close)
    assert isinstance(error, RuntimeError if world.rank == 1 else cometrt.PeerTimeout)
    if world.rank != 1:
        assert "rank 1 left without closing: rank 1 raised RuntimeError" in str(error)
    assert not world.gpu.closed
    assert time.monotonic() - begin < 10


def device_memory_of_all_is_closed():
    world = connect()
    world.gpu = Gpu([5] * SIZE)
    world.close()
    assert world.gpu.closed


def kernels_that_wait_for_a_rank_that_closes():
    """They look at no control block: the rank that closes ends their waits."""
    world, begin = connect(), time.monotonic()
    world.gpu = Gpu([9, 10, 10])
    if world.rank == 0:
        error = caught(world.close)
        assert isinstance(error, cometrt.PeerTimeout)
    else:
        while not world.stopped:
            assert time.monotonic() - begin < 10
        error = caught(world.check_running)
        world.abandon(error)
    assert "rank 0 has closed the world after 9 calls; rank 1 is in its 10th call" in str(error)


def main() -> None:
    with aborting():
        for part in (
            another_number_of_calls,
            a_late_close,
            reset_by_the_rank_that_failed,
            a_forked_child,
            a_view_outlives_its_world,
            memory_is_given_back,
            no_memory_on_one_rank,
            little_room,
            device_memory_that_one_rank_cannot_let_go,
            device_memory_of_all_is_closed,
            kernels_that_wait_for_a_rank_that_closes,
        ):
            part()
            MPI.COMM_WORLD.Barrier()
        world = connect()  # MPI is not used any more from here on
        rank = Rank(world, CASE, [INPUTS])
        MPI.Finalize()
        works(world, rank)
        world.close()
        assert "has been finalised" in str(caught(connect))
        print("all parts passed", flush=True)


if __name__ == "__main__":
    main()
