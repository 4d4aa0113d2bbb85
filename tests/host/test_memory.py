"""`MoESpec.memory` is what is allocated, it is compared with what there is before anything is, and
memory that no open layer needs is given back."""

import dataclasses
import gc
import re
import time
import tracemalloc
import weakref

import numpy as np
import pytest

import cometrt
from cometrt import memory
from cometrt.buffers import total_bytes
from cometrt.models import scaled_spec
from cometrt.plan import PlanShape
from cometrt.specs import Geometry
from cometrt.world import room
from cometrt.world.room import Room
from tests.cases import Case, check_case, make_inputs
from tests.host.test_failures import caught
from tests.host.test_orders import Rank

SPEC = cometrt.MoESpec(hidden=64, intermediate=96, num_experts=8, topk=2, max_tokens=32)
CASES = [
    Case((1, 1)),
    Case((4, 1), save="z"),
    Case((4, 2), activation="relu", dtype="float32"),
    Case((3, 3), order="columns", save="z", seed=1),
    Case((4, 2), save="nothing"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_heap_residuals_and_weights_are_what_is_allocated(case):
    inputs = make_inputs(case)

    def fn(world):
        rank = Rank(world, case, [inputs])
        rank.forward(0)
        *kept, w_up, w_down = rank.saved[0]
        regions = ("data", "flags", "routing0", "routing1")
        return (
            sum(world.regions.of(name, world.rank).nbytes for name in regions)
            + world.control_block.nbytes,
            sum(array.nbytes for array in kept),
            w_up.nbytes + w_down.nbytes,
        )

    for training in (True, False):
        found = case.spec.memory(case.size, device="host", config=case.config, training=training)
        for heap, residuals, weights in cometrt.spawn(fn, case.size):
            assert found.heap == heap
            assert found.residuals == (residuals if training else 0)
            assert found.weights == weights
        assert found.total == found.heap + found.residuals + found.scratch + found.weights


@pytest.mark.parametrize("save", ["rows", "z", "nothing"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_scratch_is_what_the_greediest_call_takes(save, dtype):
    # Rows and weights of some MB; a tile, the plan and an expert's share are small beside them.
    spec = cometrt.MoESpec(
        512, 256, num_experts=24, topk=2, max_tokens=1200, save=save, dtype=dtype, tp=1
    )
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1200, 512)).astype(dtype)
    routing = cometrt.router.softmax_topk(rng.standard_normal((1200, 24)), 2)
    weights = [rng.standard_normal(s).astype(dtype) for s in ((24, 512, 512), (24, 512, 256))]
    config = cometrt.TileConfig(block_m=16)

    def fn(world):
        layer = cometrt.MoELayer(world, spec, config=config)
        out = np.empty_like(x)
        grads = cometrt.Gradients(
            np.empty_like(x),
            np.empty((1200, 2), np.float32),
            *(np.empty_like(weight) for weight in weights),
        )

        def peak(call):
            tracemalloc.start()
            try:
                result = call()
                return tracemalloc.get_traced_memory()[1], result
            finally:
                tracemalloc.stop()

        inference, _ = peak(lambda: layer.forward(x, *routing, *weights, training=False, out=out))
        forward, (_, saved) = peak(lambda: layer.forward(x, *routing, *weights, out=out))
        backward, _ = peak(lambda: layer.backward(out, saved, out=grads))
        return inference, forward, backward

    ((inference, forward, backward),) = cometrt.spawn(fn, 1)
    found = spec.memory(1, device="host", config=config, training=False)
    assert found.scratch <= inference < 1.15 * found.scratch
    found = spec.memory(1, device="host", config=config)
    greediest = max(forward - found.residuals, backward)
    assert found.scratch <= greediest < 1.15 * found.scratch


@pytest.mark.parametrize("mode", ["fused", "sequential", "chunked"])
def test_memory_on_cuda_needs_no_gpu(mode):
    spec = cometrt.MoESpec(7168, 2048, num_experts=256, topk=8, max_tokens=4096)
    rows = spec.memory(8, mode=mode)
    assert rows.weights == 32 * 3 * 7168 * 2048 * 2
    assert spec.memory(8, mode=mode, training=False).residuals == 0
    z, nothing = (
        dataclasses.replace(spec, save=save).memory(8, mode=mode) for save in ("z", "nothing")
    )
    assert nothing.residuals < z.residuals < rows.residuals
    # z is computed again where dz will lie; the fused launch that does so has some counters.
    assert 0 <= nothing.scratch - z.scratch < 1 << 16
    more = dataclasses.replace(spec, max_tokens=8192).memory(8, mode=mode)
    assert (more.heap > rows.heap, more.scratch > rows.scratch) == (True, True)


@pytest.mark.parametrize("device", ["host", "cuda"])
@pytest.mark.parametrize("activation", ["swiglu", "relu"])
@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("save", ["rows", "z", "nothing"])
def test_saved_bytes_of_a_token(save, tp, activation, device):
    # The table of docs/memory.md, in elements; all but the few tables of the plan.
    spec = cometrt.MoESpec(
        256, 96 * tp, num_experts=8, topk=2, max_tokens=4096, tp=tp, activation=activation,
        save=save, capacity_factor=1.25,
    )  # fmt: skip
    rows, z_columns = 1.25 * 2 * tp, 96 * (2 if spec.gated else 1)
    of_x = rows * 256 if save == "rows" else 256
    of_z = 0 if save == "nothing" else rows * z_columns
    shape = PlanShape(Geometry(spec, 0, 4), cometrt.TileConfig())
    found = memory.buffers_of(device).residuals(shape)
    assert list(found)[:3] == ["meta", "epoch", "x"]
    assert ("z" in found) == (save != "nothing")
    saved = total_bytes({name: found[name] for name in ("x", "z") if name in found})
    padding = shape.capacity - rows * spec.max_tokens
    assert 0 <= padding < 128 * shape.geometry.local_experts
    padded = 2 * padding * ((save == "rows") * 256 + (z_columns if of_z else 0))
    assert saved == 2 * (of_x + of_z) * spec.max_tokens + padded
    assert spec.memory(4, device=device).residuals == total_bytes(found)


@pytest.mark.parametrize(
    ("model", "expected"),
    [("qwen3-30b-a3b", (118_471, 55_047, 4_407)), ("mixtral-8x7b", (263_282, 238_578, 8_306))],
)
def test_bytes_of_a_token_in_the_guide(model, expected):
    for save, found in zip(("rows", "z", "nothing"), expected, strict=True):
        spec = scaled_spec(model, max_tokens=8192, save=save)
        assert round(spec.memory(4).residuals / 8192) == found


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0}, "size must be an integer in [1, 64] (got 0)"),
        ({"size": 65}, "size must be an integer in [1, 64] (got 65)"),
        (
            {"size": 3},
            "num_experts must be divisible by the number of expert groups, ranks / tp = 3 / 1 = 3",
        ),
        ({"device": "gpu"}, "device must be one of host, cuda (got 'gpu')"),
        ({"mode": "fast"}, "mode must be one of fused, sequential, chunked (got 'fast')"),
        ({"config": 3}, "config must be a TileConfig (got <class 'int'>)"),
        ({"training": None}, "training must be True or False (got None)"),
        ({"ranks_per_node": 3}, "ranks_per_node must divide all ranks, 4 (got 3)"),
        ({"ranks_per_node": 0}, "ranks_per_node must be an integer in [1, 64] (got 0)"),
    ],
)
def test_wrong_arguments(arguments, message):
    arguments = {"size": 4} | arguments
    with pytest.raises(ValueError, match=re.escape(message)):
        SPEC.memory(arguments.pop("size"), **arguments)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"hidden": 28688}, "hidden"),
        ({"tp": 3}, "tp"),
        ({"max_tokens": 1 << 30}, "max_tokens"),
        ({"max_tokens": 10**400}, "max_tokens"),
        ({"num_experts": 1 << 40}, "num_experts"),
        ({"topk": 1025, "num_experts": 2048}, "topk"),
        ({"dtype": "float32"}, "dtype"),
    ],
)
def test_errors_name_the_field(change, field):
    spec = dataclasses.replace(SPEC, **change)
    with pytest.raises(ValueError, match=rf"^{field} must "):
        spec.memory(4)


def test_a_home_holds_the_tokens_of_its_rail():
    assert SPEC.memory(4, ranks_per_node=4) == SPEC.memory(4)
    two, one = (SPEC.memory(4, ranks_per_node=n) for n in (2, 1))
    assert SPEC.memory(4).weights == two.weights == one.weights
    assert two.heap > SPEC.memory(4).heap
    rail = SPEC.max_tokens * SPEC.hidden * 2  # bytes of the tokens of one rank
    assert one.heap - two.heap > 2 * rail  # x and dy of two more ranks, less what stays inside
    wide = dataclasses.replace(SPEC, num_experts=128)
    assert wide.memory(128, ranks_per_node=8).total > 0


# ---- what there is ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": 1 << 40}, "hidden=1099511627776"),
        ({"intermediate": 1 << 40}, "the largest part is .*intermediate=1099511627776"),
        ({"max_tokens": 1 << 27}, "max_tokens=134217728, topk=2, capacity_factor=2.0"),
        ({"num_experts": 1 << 24}, "num_experts=16777216"),
        ({"hidden": 16 << 4000}, "hidden="),
    ],
)
def test_huge_layers_are_refused_before_anything_is_allocated(change, message):
    def fn(world):
        begin = time.monotonic()
        error = caught(cometrt.MoELayer, world, dataclasses.replace(SPEC, **change))
        assert type(error) is cometrt.CometError
        assert re.search(message, str(error))
        assert time.monotonic() - begin < 2
        cometrt.MoELayer(world, SPEC)  # and the world goes on
        return str(error)

    assert len(set(cometrt.spawn(fn, 2))) == 1


def test_the_heaps_of_all_ranks_are_compared_with_what_is_available(monkeypatch):
    control_block = cometrt.spawn(lambda world: world.control_block.nbytes, 2)[0]
    needed = 2 * (SPEC.memory(2, device="host").heap - control_block)
    total = room.host_room().total

    def fn(world):
        return caught(cometrt.MoELayer, world, SPEC)

    monkeypatch.setattr(memory, "host_room", lambda: Room("here", needed, total))
    assert cometrt.spawn(fn, 2) == [None, None]
    monkeypatch.setattr(memory, "host_room", lambda: Room("here", needed - 1, total))
    for error in cometrt.spawn(fn, 2):
        assert isinstance(error, cometrt.CometError)
        assert f"takes {needed:,} bytes on the 2 ranks of here together" in str(error)
        assert f"{needed - 1:,} are available; the size follows from max_tokens=32" in str(error)


def test_a_layer_that_needs_nothing_new_is_not_compared(monkeypatch):
    total = room.host_room().total

    def fn(world):
        layer = cometrt.MoELayer(world, SPEC)
        world.barrier()
        monkeypatch.setattr(memory, "host_room", lambda: Room("here", 0, total))
        world.barrier()
        assert caught(cometrt.MoELayer, world, SPEC) is None
        layer.close()

    cometrt.spawn(fn, 2)


def test_the_host_says_what_it_has_within_the_limits_of_a_container(monkeypatch):
    found = room.host_room()
    assert 0 < found.available <= found.total
    files = {
        "/proc/meminfo": "MemTotal:  4000 kB\nMemAvailable:  3000 kB\nHugePages_Total:  0\n",
        "/sys/fs/cgroup/memory.max": "1000000\n",
        "/sys/fs/cgroup/memory.current": "900000\n",
        "/sys/fs/cgroup/memory.stat": "anon 700000\nactive_file 5000\ninactive_file 45000\n",
    }
    monkeypatch.setattr(room, "_read", lambda file: files.get(file, ""))
    assert room.host_room() == Room("this host", 150000, 1000000)
    files["/sys/fs/cgroup/memory.max"] = "max\n"
    assert room.host_room() == Room("this host", 3000 << 10, 4000 << 10)
    files["/sys/fs/cgroup/memory/memory.limit_in_bytes"] = "2000000\n"
    files["/sys/fs/cgroup/memory/memory.usage_in_bytes"] = "2500000\n"
    assert room.host_room() == Room("this host", 0, 2000000)
    files.clear()
    assert room.host_room().available > 1 << 60


# ---- what is given back -------------------------------------------------------------------------


class Memory:
    """Regions of one rank that are still there."""

    def __init__(self, world):
        self._world, self._seen = world, []

    def look(self):
        self._seen.append(weakref.ref(self._world.regions.of("data", self._world.rank)))

    def alive(self):
        gc.collect()
        return [ref() is not None for ref in self._seen]


@pytest.mark.parametrize("how", ["close", "drop"])
def test_memory_goes_with_the_layers_that_needed_it(how):
    case = Case((2, 1))
    inputs = make_inputs(case)
    large = dataclasses.replace(case.spec, max_tokens=400)

    def fn(world):
        rank, seen = Rank(world, case, [inputs]), Memory(world)
        small = world.regions.nbytes("data")
        seen.look()
        layer = cometrt.MoELayer(world, large)
        seen.look()
        assert world.regions.nbytes("data") > small
        rank.forward(0)
        if how == "close":
            layer.close()
        else:
            del layer
        rank.backward(0)
        view = rank.layer.buffer()[:2]
        view[...] = 5
        world.barrier()
        other = cometrt.MoELayer(world, case.spec, config=case.config)
        seen.look()
        assert world.regions.nbytes("data") == small
        assert (view == 5).all()  # as long as there is a view of it, memory stays
        rank.forward(0)
        del view
        world.barrier()
        third = cometrt.MoELayer(world, large, config=case.config)
        third.close()
        world.barrier()
        assert seen.alive()[:2] == [False, False]
        assert other is not None
        return rank.backward(0)

    check_case(case, inputs, cometrt.spawn(fn, 2, timeout_sec=20))
