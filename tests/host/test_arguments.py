"""A wrong argument is a ValueError that names it, its value and the rule; nothing has happened."""

import dataclasses
import re
import sys

import numpy as np
import pytest

import cometrt

SPEC = {"hidden": 64, "intermediate": 96, "num_experts": 8, "topk": 2, "max_tokens": 32}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": 0}, "hidden must be an integer >= 1 (got 0)"),
        ({"hidden": 24}, "hidden must be a multiple of 16 (got 24)"),
        ({"hidden": 64.0}, "hidden must be an integer >= 1 (got 64.0)"),
        ({"hidden": True}, "hidden must be an integer >= 1 (got True)"),
        ({"intermediate": -16}, "intermediate must be an integer >= 1 (got -16)"),
        ({"intermediate": 24}, "intermediate / tp must be a multiple of 16 (got 24 / 1 = 24)"),
        ({"tp": 5}, "intermediate must be divisible by tp=5 (got 96)"),
        ({"tp": 4}, "intermediate / tp must be a multiple of 16 (got 96 / 4 = 24)"),
        ({"tp": 0}, "tp must be an integer >= 1 (got 0)"),
        ({"num_experts": 0}, "num_experts must be an integer >= 1 (got 0)"),
        ({"topk": 0}, "topk must be an integer >= 1 (got 0)"),
        ({"topk": 9}, "topk must be <= num_experts=8 (got 9)"),
        ({"max_tokens": 0}, "max_tokens must be an integer >= 1 (got 0)"),
        ({"max_tokens": "8"}, "max_tokens must be an integer >= 1 (got '8')"),
        ({"activation": "tanh"}, "activation must be one of swiglu, geglu, silu, gelu, relu"),
        ({"activation": None}, "activation must be one of"),
        ({"dtype": "float16"}, "dtype must be one of bfloat16, float32 (got 'float16')"),
        ({"dtype": np.float32}, "dtype must be one of the strings 'bfloat16', 'float32' (got <cl"),
        ({"save": "all"}, "save must be one of rows, z, nothing (got 'all')"),
        ({"capacity_factor": 0}, "capacity_factor must be a finite number > 0 (got 0)"),
        ({"capacity_factor": float("nan")}, "capacity_factor must be a finite number > 0"),
        ({"capacity_factor": "2"}, "capacity_factor must be a finite number > 0 (got '2')"),
        ({"capacity_factor": True}, "capacity_factor must be a finite number > 0 (got True)"),
        ({"capacity_factor": 10**400}, "capacity_factor must be a finite number > 0 (got 1000"),
    ],
)
def test_spec(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        cometrt.MoESpec(**(SPEC | change))


def test_specs_are_hashable_and_take_numpy_integers():
    spec = cometrt.MoESpec(**(SPEC | {"hidden": np.int64(64)}))
    assert spec == cometrt.MoESpec(**SPEC)
    assert len({spec, cometrt.MoESpec(**SPEC)}) == 1
    assert spec.digest() == cometrt.MoESpec(**SPEC).digest()
    assert spec.digest() != cometrt.MoESpec(**(SPEC | {"topk": 3})).digest()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_m": 0}, "block_m must be an integer >= 1 (got 0)"),
        ({"block_n": 24}, "block_n must be a multiple of 16 (got 24)"),
        ({"block_tokens": 1.5}, "block_tokens must be an integer >= 1 (got 1.5)"),
        ({"order": "rows"}, "order must be one of phases, columns (got 'rows')"),
        ({"block_n": 64, "n_chunk": 96}, "n_chunk must be a multiple of block_n=64 (got 96)"),
        ({"num_phases": 0}, "num_phases must be an integer >= 1 (got 0)"),
        ({"raster_group": 0}, "raster_group must be an integer >= 2 (got 0)"),
        ({"raster_group": 3}, "raster_group must be even (got 3)"),
        ({"pipeline_chunks": 0}, "pipeline_chunks must be an integer >= 1 (got 0)"),
        ({"comm_sms": 1}, "comm_sms must be an integer >= 2 (got 1)"),
        ({"comm_sms": 5}, "comm_sms must be even (got 5)"),
        ({"dispatch_ctas": 0}, "dispatch_ctas must be an integer >= 1 (got 0)"),
        ({"combine_ctas": 2.0}, "combine_ctas must be an integer >= 1 (got 2.0)"),
        ({"backward_order": "rows"}, "backward_order must be one of phases, columns (got 'rows')"),
        (
            {"block_n": 64, "backward_n_chunk": 96},
            "backward_n_chunk must be a multiple of block_n=64 (got 96)",
        ),
        ({"backward_dispatch_ctas": 0}, "backward_dispatch_ctas must be an integer >= 1 (got 0)"),
        ({"backward_combine_ctas": 0}, "backward_combine_ctas must be an integer >= 1 (got 0)"),
    ],
)
def test_tile_config(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        cometrt.TileConfig(**change)


def test_a_backward_has_the_forwards_config_but_for_its_own_fields():
    config = cometrt.TileConfig(n_chunk=512, dispatch_ctas=3, num_phases=4)
    assert config.of_backward() == config
    own = {"order": "columns", "n_chunk": 1024, "dispatch_ctas": 5, "combine_ctas": 7}
    changed = dataclasses.replace(config, **{f"backward_{name}": own[name] for name in own})
    assert changed.of_backward() == dataclasses.replace(config, **own)
    assert changed.of_backward().of_backward() == changed.of_backward()


def without_gpu(monkeypatch, message):
    if "NVIDIA" in message:
        monkeypatch.setitem(sys.modules, "cupy", None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ranks": 0}, "ranks must be an integer >= 1 (got 0)"),
        ({"ranks": 2.0}, "ranks must be an integer >= 1 (got 2.0)"),
        ({"device": "tpu"}, "device must be one of host, cuda (got 'tpu')"),
        ({"device": "cuda"}, "device='cuda' needs an NVIDIA GPU and the cuda13 extra ("),
        ({"timeout_sec": 0}, "timeout_sec must be a finite number > 0 (got 0)"),
        ({"timeout_sec": float("inf")}, "timeout_sec must be a finite number > 0 (got inf)"),
        ({"timeout_sec": 1e12}, "timeout_sec must be at most "),
        ({"link": "h100"}, "link must be None on device='host' (got 'h100')"),
        ({"link": "h300"}, "link must be one of h100, h200, h800 (got 'h300')"),
        ({"fn": 3}, "fn must be callable with a world (got 3)"),
    ],
)
def test_spawn(arguments, message, monkeypatch):
    without_gpu(monkeypatch, message)
    with pytest.raises(ValueError, match=re.escape(message)):
        cometrt.spawn(**({"fn": lambda world: None, "ranks": 2} | arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"comm": None}, "comm must be an mpi4py intracommunicator (got None)"),
        ({"device": "gpu"}, "device must be one of host, cuda (got 'gpu')"),
        ({"device": "cuda"}, "device='cuda' needs an NVIDIA GPU and the cuda13 extra ("),
        ({"device": "host", "timeout_sec": -1}, "timeout_sec must be a finite number > 0"),
    ],
)
def test_connect(arguments, message, monkeypatch):
    without_gpu(monkeypatch, message)
    MPI = pytest.importorskip("mpi4py.MPI")
    device = {"device": "host"} if "comm" in arguments else {}
    with pytest.raises(ValueError, match=re.escape(message)):
        cometrt.connect(**({"comm": MPI.COMM_SELF} | device | arguments))


def test_connect_notices_a_launcher_of_another_mpi(monkeypatch):
    MPI = pytest.importorskip("mpi4py.MPI")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    with pytest.raises(ValueError, match=r"it started 4, MPI\.COMM_WORLD has 1; .* different MPI"):
        cometrt.connect(MPI.COMM_WORLD, device="host")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 4}, "rank must be an integer in [0, 3] (got 4)"),
        ({"rank": -1}, "rank must be an integer in [0, 3] (got -1)"),
        (
            {"size": 3},
            "num_experts must be divisible by the number of expert groups, ranks / tp = 3 / 1 = 3",
        ),
        ({"size": 0}, "size must be an integer >= 1 (got 0)"),
        ({"spec": "spec"}, "spec must be a cometrt.MoESpec"),
        ({"w_up_all": np.zeros((8, 96, 64))}, "w_up_all must have shape (8, 192, 64)"),
        ({"w_down_all": np.zeros((8, 96, 64))}, "w_down_all must have shape (8, 64, 96)"),
    ],
)
def test_shard_weights(arguments, message):
    good = {
        "w_up_all": np.zeros((8, 192, 64)),
        "w_down_all": np.zeros((8, 64, 96)),
        "rank": 0,
        "size": 4,
        "spec": cometrt.MoESpec(**SPEC),
    }
    with pytest.raises(ValueError, match=re.escape(message)):
        cometrt.shard_weights(**(good | arguments))


def test_shards_put_together_are_the_whole():
    spec = cometrt.MoESpec(**(SPEC | {"tp": 3}))
    rng = np.random.default_rng(0)
    w_up, w_down = rng.normal(size=(8, 192, 64)), rng.normal(size=(8, 64, 96))
    parts = [cometrt.shard_weights(w_up, w_down, rank, 6, spec) for rank in range(6)]
    for group in range(2):
        ups = [parts[3 * group + shard][0].reshape(4, 2, 32, 64) for shard in range(3)]
        whole = np.concatenate(ups, axis=2).reshape(4, 192, 64)
        np.testing.assert_array_equal(whole, w_up[4 * group : 4 * group + 4])
        downs = [parts[3 * group + shard][1] for shard in range(3)]
        np.testing.assert_array_equal(
            np.concatenate(downs, axis=2), w_down[4 * group : 4 * group + 4]
        )


# ---- construction: every rank raises, whichever rank was wrong ----------------------------------


@pytest.mark.parametrize(
    ("arguments_of_rank_1", "message"),
    [
        ({"spec": None}, "spec must be a cometrt.MoESpec (got <class 'NoneType'>) [rank 1]"),
        ({"mode": "fast"}, "mode must be one of fused, sequential, chunked (got 'fast') [rank 1]"),
        ({"config": 3}, "config must be a TileConfig (got <class 'int'>) [rank 1]"),
        ({"mode": "sequential"}, "mode must be equal on all ranks (got None on rank 0, "),
        (
            {"spec": cometrt.MoESpec(**(SPEC | {"topk": 1}))},
            "spec must be equal on all ranks (got MoESpec(topk=2) on rank 0, MoESpec(topk=1) on",
        ),
        (
            {"spec": cometrt.MoESpec(**(SPEC | {"hidden": 32, "save": "z"}))},
            "(got MoESpec(hidden=64, save='rows') on rank 0, MoESpec(hidden=32, save='z') on rank",
        ),
        ({"config": cometrt.TileConfig(block_m=16)}, "config must be equal on all ranks (got None"),
    ],
)
def test_construction_raises_on_all_ranks(arguments_of_rank_1, message):
    def fn(world):
        arguments = {"spec": cometrt.MoESpec(**SPEC)}
        with pytest.raises(ValueError, match=re.escape(message)):
            cometrt.MoELayer(world, **(arguments | (arguments_of_rank_1 if world.rank else {})))
        cometrt.MoELayer(world, **arguments)  # and the world goes on

    cometrt.spawn(fn, 2)


@pytest.mark.parametrize(
    ("change", "ranks", "message"),
    [
        ({"tp": 2}, 3, "tp must divide the number of ranks 3 (got tp=2)"),
        (
            {},
            3,
            "divisible by the number of expert groups, ranks / tp = 3 / 1 = 3 (got 8)",
        ),
    ],
)
def test_specs_that_do_not_fit_the_world(change, ranks, message):
    def fn(world):
        with pytest.raises(ValueError, match=re.escape(message)):
            cometrt.MoELayer(world, cometrt.MoESpec(**(SPEC | change)))

    cometrt.spawn(fn, ranks)


def test_world_must_be_one():
    with pytest.raises(ValueError, match=r"world must come from cometrt\.connect or spawn"):
        cometrt.MoELayer(None, cometrt.MoESpec(**SPEC))
