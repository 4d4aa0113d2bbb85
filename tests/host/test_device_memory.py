"""Memory on GPUs, given back and closed; CUDA is a stand-in on the host's memory."""

import contextlib
import ctypes
import gc
import sys
import threading
import types
import weakref

import numpy as np
import pytest

import cometrt
from cometrt.world.reset import end_device_waits
from cometrt.world.threads import ThreadWorld, _Process
from tests.host.test_failures import caught


class Memory:
    """Of the device: the host's."""

    def __init__(self, nbytes):
        self.bytes = np.zeros(nbytes, np.uint8)


class Pointer:
    def __init__(self, memory, offset):
        self.mem, self.ptr = memory, memory.bytes.ctypes.data + offset

    def __add__(self, offset):
        return Pointer(self.mem, self.ptr - self.mem.bytes.ctypes.data + offset)


class Array:
    def __init__(self, shape, dtype, pointer):
        assert shape == (1,)
        self._value = np.frombuffer((ctypes.c_char * 8).from_address(pointer.ptr), dtype)

    def set(self, values):
        self._value[:] = values

    def get(self):
        return self._value.copy()


class Device(contextlib.nullcontext):
    id = 0


class Stream:
    ptr = 0

    def synchronize(self):
        pass


@pytest.fixture
def cuda(monkeypatch):
    def copy(target, source, nbytes, *_):
        ctypes.memmove(target, source, nbytes)

    cupy = types.ModuleType("cupy")
    cupy.ndarray, cupy.uint64 = Array, np.uint64
    cupy.cuda = types.SimpleNamespace(
        Device=lambda *_: Device(),
        Memory=Memory,
        MemoryPointer=Pointer,
        Stream=lambda **_: Stream(),
        alloc=lambda nbytes: Pointer(Memory(nbytes), 0),
        alloc_pinned_memory=lambda nbytes: (ctypes.c_char * nbytes)(),
        get_current_stream=Stream,
        runtime=types.SimpleNamespace(
            memset=lambda pointer, value, nbytes: ctypes.memset(pointer, value, nbytes),
            memcpyAsync=copy,
            memcpyDeviceToHost=2,
            memcpyHostToDevice=1,
            deviceSynchronize=lambda: None,
        ),
    )
    monkeypatch.setitem(sys.modules, "cupy", cupy)


class Owner:
    """Of some memory; a layer's heap is one."""


def on_ranks(fn, ranks=2, shares_gpu=True):
    """`fn(world)` on threads, as spawn would run it on a GPU."""
    process, results = _Process(ranks, shares_gpu), [None] * ranks

    def run(rank):
        world = ThreadWorld(rank, process, "cuda", 5.0)
        try:
            results[rank] = fn(world)
            world.close()
        except BaseException as error:
            world.abandon(error)
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def grow(world, nbytes, owner):
    """References to the memory of both regions."""
    world.regions.fit(owner, {"data": nbytes, "flags": 64})
    places = [world.regions.of(name, world.rank) for name in ("data", "flags")]
    return [weakref.ref(world.gpu.memory(place).mem) for place in places]


@pytest.mark.parametrize("shares_gpu", [True, False])
def test_outgrown_memory_is_freed_and_no_other(cuda, shares_gpu):
    def fn(world):
        small, large = Owner(), Owner()
        first = grow(world, 1000, small)
        second = grow(world, 5000, large)
        gc.collect()
        assert [first[0]() is None, first[1]() is None] == [True, False]
        assert (second[0]().bytes == 0xFF).all()  # poisoned until it is written
        assert (second[1]().bytes == 0).all()
        world.regions.forget(large)
        third = grow(world, 1000, small)
        gc.collect()
        assert second[0]() is None
        assert world.regions.nbytes("data") == 1000
        assert len(world.gpu.own) == 3  # with the control block
        assert len(world.gpu.opened) == 3
        return third[0]() is not None

    assert on_ranks(fn, shares_gpu=shares_gpu) == [True, True]


def test_memory_of_captured_calls_is_kept_on_all_ranks(cuda):
    def fn(world):
        first = grow(world, 1000, owner := Owner())
        world.gpu.captured = world.rank == 1
        grow(world, 5000, other := Owner())
        gc.collect()
        assert owner is not other
        return first[0]() is not None

    assert on_ranks(fn) == [True, True]


def test_a_rank_that_cannot_let_go_keeps_the_memory_of_all(cuda, monkeypatch):
    def close(world, pointer):
        if world.rank == 1:
            raise RuntimeError("cannot close")

    monkeypatch.setattr(ThreadWorld, "close_device_memory", close)

    def fn(world):
        first = grow(world, 1000, owner := Owner())
        second = grow(world, 5000, other := Owner())
        gc.collect()
        assert owner is not other
        world.barrier()  # the world goes on
        return first[0]() is not None, second[0]() is not None

    assert on_ranks(fn) == [(True, True)] * 2


def test_kernels_that_wait_for_a_rank_that_makes_no_more_calls_are_ended(cuda):
    def fn(world):
        world.gpu.control_field("epoch").set(10 if world.rank == 1 else 9)
        world.barrier()
        assert world.gpu.read_epochs([0, 1]) == [9, 10]
        if world.rank == 0:
            end_device_waits(world, "has closed the world")
        else:
            while not world.stopped:
                pass
        error = caught(world.check_running)
        assert "rank 0 has closed the world after 9 calls; rank 1 is in its 10th call" in str(error)
        assert (error.flag, error.peer, error.waiter) == ("source_ready", 0, 1)
        return isinstance(error, cometrt.PeerTimeout)

    assert on_ranks(fn) == [True, True]


def test_kernels_that_keep_step_are_left_alone(cuda):
    def fn(world):
        world.gpu.control_field("epoch").set(9)
        world.barrier()
        end_device_waits(world, "has closed the world")
        world.barrier()
        world.reset()
        return world.epoch

    assert on_ranks(fn) == [9, 9]
