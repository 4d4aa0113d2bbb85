"""Benchmarks: their command lines, cells, figures, result files and tables. CuPy is a stand-in."""

import argparse
import dataclasses
import json
import subprocess
import sys
import threading
import time
import types
from unittest.mock import MagicMock

import numpy as np
import pytest

import benchmarks
import cometrt
from benchmarks import all_gpus, rivals, stacks, tables
from cometrt import bench
from cometrt.bench import records, timing, workloads
from cometrt.bench.timing import WARM_UP, Call, Method, measure, slowest
from cometrt.bench.workloads import Cell
from cometrt.models import Model
from cometrt.plan import PlanShape
from cometrt.specs import Geometry
from cometrt.tuner.cache import SCHEMA, Key
from cometrt.tuner.search import Found
from tests.launch import ROOT

ENGINE = ("engine_forms", "engine_backward")
MACHINE = {"gpu": "A GPU", "driver": 13000, "date": "2026-01-01", "commit": "abc"}
START = """
import runpy, sys
from unittest.mock import MagicMock
cupy = MagicMock()
cupy.cuda.runtime.getDeviceCount.return_value = 2
sys.modules |= {"cupy": cupy, "cupy.cuda": cupy.cuda, "cupy.cuda.nccl": cupy.cuda.nccl}
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__")
"""


def start(module, *options):
    command = [sys.executable, "-c", START, f"benchmarks.{module}", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture
def cupy(monkeypatch):
    """A stand-in, for modules that are imported anew."""
    cupy = MagicMock()
    for name, module in {"cupy": cupy, "cupy.cuda": cupy.cuda}.items():
        monkeypatch.setitem(sys.modules, name, module)
    forget_those_with_cupy()
    yield cupy
    forget_those_with_cupy()


def forget_those_with_cupy():
    for package, names in (
        (
            benchmarks,
            ("peers", "nodes", "layer", "latency", "engine", "defaults", "sweep", *ENGINE),
        ),
        (bench, ("contenders", "nccl", "step_memory")),
    ):
        for name in names:
            if sys.modules.pop(f"{package.__name__}.{name}", None):
                delattr(package, name)


# ---- command lines -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "module",
    [
        *"engine layer nodes peers end_to_end link latency host_time router tables".split(),
        *"defaults sweep rivals_torch rivals_jax jax_step".split(),
    ],
)
def test_a_benchmark_says_how_to_use_it(module):
    found = start(module, "--help")
    assert found.returncode == 0, found.stderr
    assert "usage:" in found.stdout


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        (["--pass", "forward,sideways"], "sideways"),
        (["--contenders", "fused,deepep"], "deepep"),
        (["--models", "mixtral"], "mixtral"),
        (["--rivals", "torch,tensorflow"], "tensorflow"),
    ],
)
def test_unknown_names_are_refused(options, wrong):
    found = start("peers", *options)
    assert found.returncode == 2
    assert wrong in found.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("module", "wrong"),
    [
        ("engine", ["--pass", "forward,both"]),
        ("engine", ["--models", "mixtral"]),
        ("host_time", ["--pass", "forth"]),
        ("host_time", ["--mode", "cublas"]),
    ],
)
def test_passes_and_models_must_be_known(module, wrong):
    found = start(module, *wrong)
    assert found.returncode == 2
    assert wrong[1].split(",")[-1] in found.stderr.splitlines()[-1]


def test_options_make_cells(cupy):
    from benchmarks import peers

    line = "--models mixtral-8x7b,qwen2-moe --tokens 256,8192 --skew 0.4 --pass forward,both"
    args = peers.parse(line.split())
    assert [str(cell) for cell in peers.cells_of(args, 4)] == [
        f"{model} W=4 T={tokens} skew=0.4"
        for model in ("mixtral-8x7b", "qwen2-moe")
        for tokens in (256, 8192)
    ]
    assert args.passes == ["forward", "both"]


def test_cells_like_those_of_several_gpus(cupy):
    from benchmarks import layer

    found = layer.cells_like(tables.RESULTS / "peers_4.json", "h200")
    assert str(found[0][0]) == "qwen3-30b-a3b W=4 T=8192 link=h200"
    assert found[0][1].order == "columns"
    assert len(found) == 5


def test_the_engines_forms_are_those_of_the_passes_asked_for(cupy):
    from benchmarks import engine

    args = engine.parse(["--pass", "backward", "--models", "phi-3.5-moe"])
    made = []
    engine.form_of = lambda name, form: made.append((name, form))
    engine.measure_form = lambda label, form, rounds: {}
    assert [label for label, _ in engine.measured(args)] == [
        f"phi-3.5-moe {form}" for form in ("down dgrad", "up dgrad", "down wgrad", "up wgrad")
    ]
    assert made[0] == ("phi-3.5-moe", "down dgrad")
    assert len(list(engine.measured(engine.parse([])))) == 5 * (2 + 4)


def test_the_engines_file_keeps_shapes_of_the_same_machine_and_commit(cupy, tmp_path):
    from benchmarks import engine

    path = tmp_path / "engine.json"
    assert engine.earlier(None, MACHINE) == engine.earlier(path, MACHINE) == {}
    path.write_text(json.dumps({"machine": MACHINE, "shapes": {"phi up": {}}}))
    assert engine.earlier(path, MACHINE) == {"phi up": {}}
    assert engine.earlier(path, MACHINE | {"commit": "def"}) == {}


class ColumnMajorBlas:
    """gemmStridedBatchedEx on float32 memory of the host."""

    CUBLAS_OP_N, CUBLAS_OP_T = 0, 1

    def __init__(self, arrays):
        self.arrays = arrays  # by address

    def setStream(self, *_):
        pass

    def gemmStridedBatchedEx(
        self, _, op_a, op_b, m, n, k, alpha, a, _1, lda, step_a, b, _2, ldb, step_b, beta, c, _3,
        ldc, step_c, count, *_4,
    ):  # fmt: skip
        def matrix(address, leading, step, index, rows, columns, transposed):
            if transposed:
                rows, columns = columns, rows
            flat, size = self.arrays[address].reshape(-1)[index * step :], 4
            strided = np.lib.stride_tricks.as_strided
            found = strided(flat, (rows, columns), (size, size * leading))
            return found.T if transposed else found

        for i in range(count):
            product = matrix(a, lda, step_a, i, m, k, op_a) @ matrix(b, ldb, step_b, i, k, n, op_b)
            matrix(c, ldc, step_c, i, m, n, False)[:] = product


@pytest.mark.parametrize(
    ("layout", "a", "b"), [("NT", (5, 7), (3, 7)), ("NN", (5, 7), (7, 3)), ("TN", (7, 5), (7, 3))]
)
def test_cublas_gets_every_layout(cupy, monkeypatch, layout, a, b):
    from benchmarks import engine_forms

    arrays, rng = {}, np.random.default_rng(0)

    class Array(np.ndarray):
        @property
        def data(self):
            arrays[self.ctypes.data] = self
            return types.SimpleNamespace(ptr=self.ctypes.data)

    def made(shape):
        return rng.random((2, *shape), np.float32).view(Array)

    libraries = types.SimpleNamespace(cublas=ColumnMajorBlas(arrays))
    monkeypatch.setitem(sys.modules, "cupy_backends.cuda.libs", libraries)
    monkeypatch.setattr(
        engine_forms.cp, "empty", lambda shape, _: np.zeros(shape, np.float32).view(Array)
    )
    first, second = made(a), made(b)
    run = engine_forms.batched_run(layout, first, second)
    first = first.transpose(0, 2, 1) if layout[0] == "T" else first
    second = second.transpose(0, 2, 1) if layout[1] == "T" else second
    assert run.out.shape == (2, 5, 3)
    np.testing.assert_allclose(run.out, first @ second, rtol=1e-5)


# ---- cells and routing ---------------------------------------------------------------------------


def test_every_cell_can_be():
    cells = workloads.cells("all")
    assert len({str(cell) for cell in cells}) == len(cells)
    for cell in cells:
        shape = PlanShape(Geometry(cell.spec, 0, cell.ranks), cell.config)
        assert shape.capacity >= shape.balanced_rows


def test_cells_are_chosen_by_words_of_their_names():
    chosen = [str(cell) for cell in workloads.cells("all", "qwen3 T=1024,mixtral skew")]
    assert [name.split()[0] for name in chosen] == ["mixtral-8x7b"] * 3 + ["qwen3-30b-a3b"]
    assert len(workloads.cells("models")) == 5
    assert len(workloads.cells("short")) == 2


def test_operations_of_a_pass():
    cell = Cell("qwen3-30b-a3b", ranks=4, tp=2, tokens=100)
    of_a_row = 2048 * 768
    assert cell.flops("forward") == 6 * 100 * 8 * of_a_row
    assert cell.flops("both") == cell.flops("forward") + cell.flops("backward")
    assert cell.flops("backward") == 2 * cell.flops("forward")


def test_routing_has_the_skew_that_a_cell_says():
    cell = Cell("qwen3-30b-a3b", tokens=2048, skew=0.4)
    ids = workloads.routing(cell)
    assert (np.diff(np.sort(ids, axis=2)) > 0).all()  # distinct within a token
    loads = np.bincount(ids.ravel(), minlength=128)
    assert loads.std() / loads.mean() == pytest.approx(0.4, abs=0.08)
    even = Cell("qwen3-30b-a3b", tokens=2048)
    assert workloads.busiest_rank(even, workloads.routing(even)) < 1.02
    assert workloads.busiest_rank(cell, ids) > 1.05
    sharded = Cell("qwen3-30b-a3b", tokens=64, tp=8)
    assert workloads.busiest_rank(sharded, workloads.routing(sharded)) == 1


def test_bytes_that_cross():
    cell = Cell("mixtral-8x7b", ranks=2, tokens=4)
    ids = np.array([[[0, 1]] * 4, [[0, 1], [4, 5], [0, 5], [0, 4]]])
    # None of rank 0's tokens want rank 1; three of rank 1's want rank 0.
    assert workloads.crossing_bytes(cell, ids) == 3 * 4096 * 2


def test_relative_errors():
    ones = np.ones(4)
    assert workloads.relative_error(1.5 * ones, ones) == pytest.approx(0.5)
    assert workloads.relative_error(np.full(4, np.nan), ones) == np.inf
    assert workloads.relative_error(ones, 0 * ones) == np.inf
    assert workloads.relative_error(0 * ones, 0 * ones) == 0


# ---- timing ----------------------------------------------------------------------------------


def test_times_are_those_of_the_slowest_rank():
    ranks = [{"a": [1.0, 4.0], "b": [2.0]}, {"a": [3.0, 2.0], "b": [1.0]}]
    assert slowest(ranks) == {"a": [3.0, 4.0], "b": [2.0]}


def test_a_measurement(cupy):
    """Every isolated call begins behind the start barrier; what is untimed comes before it; as many
    sustained calls as fit in the time."""
    done = []
    cupy.cuda.get_elapsed_time.return_value = 4.0
    world = types.SimpleNamespace(barrier=lambda: None, allgather=lambda value: [value])
    barrier = types.SimpleNamespace(close=lambda idle_ms: done.append(idle_ms))
    call = Call(lambda given: done.append(f"backward of {given}"), lambda: done.append("before"))
    found = measure(world, barrier, {"one": call}, Method(2, idle_ms=7.0, sustain_sec=0.02))
    assert found["one"] == {"isolated": {"median": 4.0, "p10": 4.0, "p90": 4.0}, "sustained": 4.0}
    sequence = ["before", "backward of None"]
    isolated = ["before", 7.0, "backward of None"]
    assert done == WARM_UP * sequence + 2 * isolated + [7.0] + 5 * sequence
    timed_within = Call(lambda _: None, ended=cupy.cuda.Event())
    found = measure(world, barrier, {"planning": timed_within}, Method(1))
    assert list(found["planning"]) == ["isolated"]


def test_the_start_barrier_opens_one_flag_while_the_other_is_reset(cupy, monkeypatch):
    done = []

    def kernel(grid, block, args):
        done.append(("wait", int(args[0]), int(args[1])))

    def memset(address, value, size, stream):
        done.append(("set", address, value))

    cupy.cuda.runtime.memsetAsync = memset
    monkeypatch.setattr(timing, "cuda_function", lambda source, name: kernel)
    monkeypatch.setattr("cometrt.world.partitions.auxiliary_stream", lambda number: MagicMock())
    meet = types.SimpleNamespace(
        rank=0,
        timeout_sec=2.0,
        allocate=lambda nbytes: [800],
        barrier=lambda: done.append("all ranks"),
    )
    barrier = timing.StartBarrier(meet)
    assert done[-2:] == [("set", 800, 0), "all ranks"]
    done.clear()
    for _ in range(2):
        barrier.close(5)
    never, idle, limit = 816, 5_000_000, 2_000_000_000
    assert done == [
        step
        for flag, other in ((800, 808), (808, 800))
        for step in (
            ("wait", flag, limit),
            "all ranks",
            ("set", other, 0),
            ("wait", never, idle),
            ("set", flag, 1),
        )
    ]
    meet.rank = 1
    barrier = timing.StartBarrier(meet)
    done.clear()
    barrier.close(5)
    assert done == [("wait", 800, limit), "all ranks"]


class Array(types.ModuleType):
    """NumPy as CuPy, for layers on the host."""

    def __getattr__(self, name):
        return getattr(np, name)


class MemoryHook:
    def __enter__(self):
        return self

    def __exit__(self, *raised):
        pass


class Event:
    def record(self):
        self.at = time.perf_counter()

    def synchronize(self):
        pass


@pytest.fixture
def contenders(cupy, monkeypatch):
    array = Array("cupy")
    array.cuda = cupy.cuda
    cupy.cuda.Event, cupy.cuda.MemoryHook = Event, MemoryHook
    cupy.cuda.get_elapsed_time = lambda begin, end: 1e3 * (end.at - begin.at)
    monkeypatch.setitem(sys.modules, "cupy", array)
    from cometrt.bench import contenders

    def normal(shape, scale=1.0):
        values = scale * np.random.default_rng(0).standard_normal(shape)
        return values.astype(Cell("tiny").spec.numpy_dtype)

    monkeypatch.setitem(workloads.SHAPES, "tiny", Model(64, 32, 8, 2))
    monkeypatch.setattr(contenders, "device_normal", normal)
    monkeypatch.setattr(
        contenders, "StartBarrier", lambda world: types.SimpleNamespace(close=lambda ms: None)
    )
    monkeypatch.setattr(contenders, "num_sms", lambda: 132)
    monkeypatch.setattr(contenders, "gpu_sms", lambda: 132)
    return contenders


def measured_on_host(contenders, *options):
    parser = argparse.ArgumentParser()
    contenders.add_arguments(parser)
    quick = ["--rounds", "2", "--idle-ms", "0", "--sustain-sec", "0.001"]
    args = parser.parse_args([*options, *quick, "--contenders", "fused,sequential"])
    cell = Cell("tiny", ranks=2, tokens=24)
    return cometrt.spawn(lambda world: contenders.measure_cell(world, cell, args), 2)


def test_a_cell_is_checked_and_measured(contenders):
    first, second = measured_on_host(contenders, "--pass", "forward,backward,both")
    assert first == second
    assert list(first) == ["forward", "backward", "both"]
    for which, entry in first.items():
        assert entry["flops"] == workloads.PASSES[which] * 24 * 2 * 64 * 32
        assert entry["error"] == {"fused": 0, "sequential": 0}
        assert sorted(entry["times"]) == ["fused", "sequential"]
        for times in entry["times"].values():
            assert times["isolated"]["median"] > 0
            assert times["sustained"] > 0


def test_the_memory_of_a_step_is_stated_for_both_modes(contenders, monkeypatch):
    real = cometrt.MoELayer.backward

    class Counted(contenders.Allocations):
        def __enter__(self):
            live[threading.get_ident()] = self
            return super().__enter__()

    def backward(self, *args, **more):
        if self.mode == "fused":
            live[threading.get_ident()].allocated(0, 1000 * (1 + self.world.rank))
        return real(self, *args, **more)

    live = {}  # the last of each thread
    monkeypatch.setattr(contenders, "Allocations", Counted)
    monkeypatch.setattr(cometrt.MoELayer, "backward", backward)
    entry = measured_on_host(contenders, "--pass", "backward")[0]["backward"]
    for name, calls in (("fused", 2000), ("sequential", 0)):
        found = entry["step_bytes"][name]
        # dy, y; ids, weights; both weights and all gradients, of 24 tokens and 4 local experts
        rows, pairs, weights = 24 * 64 * 2, 24 * 2 * 4, 4 * 3 * 32 * 64 * 2
        assert found["arguments"] == 3 * rows + 3 * pairs + 2 * weights
        assert found["heap"] > rows
        assert found["calls"] == calls
        assert found["total"] == sum(v for key, v in found.items() if key != "total")
    forward = measured_on_host(contenders, "--pass", "forward")[0]["forward"]
    assert forward["step_bytes"] == {}


def test_allocations_of_a_thread_are_counted(contenders):
    with contenders.Allocations() as found:
        hook = found.hook
        hook.malloc_postprocess(device_id=0, size=90, mem_size=100, mem_ptr=1, pmem_id=7)
        hook.malloc_postprocess(device_id=0, size=30, mem_size=30, mem_ptr=2, pmem_id=8)
        hook.free_postprocess(device_id=0, mem_size=100, mem_ptr=1, pmem_id=7)
        hook.free_postprocess(device_id=0, mem_size=500, mem_ptr=3, pmem_id=9)  # of before
        hook.malloc_postprocess(device_id=0, size=50, mem_size=50, mem_ptr=1, pmem_id=10)
    assert (found.now, found.peak) == (80, 130)


@pytest.mark.parametrize("wrong", ["y", "dx"])
def test_wrong_results_are_not_timed(contenders, monkeypatch, wrong):
    real = getattr(cometrt.MoELayer, "forward" if wrong == "y" else "backward")

    def spoiled(self, *args, out, **more):
        found = real(self, *args, out=out, **more)
        if self.mode == "fused" and self.world.rank == 1:
            (out if wrong == "y" else out.x)[0] = np.nan
        return found

    monkeypatch.setattr(cometrt.MoELayer, real.__name__, spoiled)
    with pytest.raises(cometrt.CometError, match="differ"):
        measured_on_host(contenders, "--pass", "both")


# ---- shipped configs ---------------------------------------------------------------------------


@pytest.fixture
def defaults(contenders, monkeypatch, tmp_path):
    """On two ranks of the host; the search finds a config at once."""
    from benchmarks import defaults

    def key_of(world, spec):
        experts, tokens = spec.num_experts, spec.max_tokens
        return Key("A GPU", 132, world.size, 2, 1, 64, 32, experts, 2, tokens, "bfloat16", "none")

    def find(world, geometry, index, base, inputs, training, budget_sec):
        assert training
        searched.append((geometry.spec.num_experts, index, budget_sec))
        config = cometrt.TileConfig(order="columns", n_chunk=512, backward_combine_ctas=8)
        return Found(config, {"forward": 1.0, "backward": 2.0}, {"forward": 1.5, "backward": 2.5})

    def spawn(fn, ranks, device, **_):
        return real(fn, ranks)

    real, searched = cometrt.spawn, []
    monkeypatch.setattr(cometrt, "spawn", spawn)
    monkeypatch.setattr(defaults.cache, "key_of", key_of)
    monkeypatch.setattr(defaults, "find", find)
    monkeypatch.setattr(defaults, "machine", lambda: MACHINE)
    monkeypatch.setattr(defaults, "free_memory", lambda devices: None)
    monkeypatch.setattr(defaults, "worlds", lambda args: iter([defaults.Threads(2)]))
    small = {"tiny": Model(64, 32, 8, 2), "other": Model(64, 32, 4, 2)}
    monkeypatch.setattr(defaults, "MODELS", small)
    monkeypatch.setattr(defaults, "EXPERTS", {"tiny": 6})
    monkeypatch.setitem(workloads.SHAPES, "other", small["other"])
    monkeypatch.setattr(defaults.cp.cuda.memory, "OutOfMemoryError", MemoryError)
    path = tmp_path / "defaults.json"
    options = ["--models", "tiny,other", "--tokens", "16", "--out", str(path)]
    return defaults, options, path, searched


def test_shipped_configs_are_measured_once_and_have_both_passes(defaults, capsys):
    defaults, options, path, searched = defaults
    defaults.main([*options, "--budget-sec", "7"])
    assert searched == 2 * [(8, 0, 7.0)] + 2 * [(6, 0, 7.0)] + 2 * [(4, 0, 7.0)]
    found = json.loads(path.read_text())
    assert found["schema"] == SCHEMA
    entry = found["entries"][next(iter(found["entries"]))]
    assert entry["ms"] == {"forward": 1.0, "backward": 2.0}
    assert entry["default_ms"] == {"forward": 1.5, "backward": 2.5}
    assert (entry["commit"], entry["config"]["backward_combine_ctas"]) == ("abc", 8)
    text = capsys.readouterr().out
    assert "[1/3] tiny W=2 T=16 E=8" in text
    assert "forward 1.000 ms, backward 2.000 ms (TileConfig() forward 1.500 ms" in text
    searched.clear()
    defaults.main(options)
    assert not searched
    assert capsys.readouterr().out.count("is in the file") == 3
    entries = found["entries"]
    del entries[next(iter(entries))]["ms"]["backward"]  # of an entry of the forward alone
    path.write_text(json.dumps(found))
    defaults.main(options)
    assert searched == 2 * [(8, 0, 45.0)]
    searched.clear()
    defaults.main([*options, "--again"])
    assert len(searched) == 6


def test_layers_that_do_not_fit_or_come_too_late_are_said(defaults, monkeypatch, capsys):
    defaults, options, path, _ = defaults

    def find(*args):
        raise cometrt.CometError("no room")

    monkeypatch.setattr(defaults, "find", find)
    defaults.main(options)
    assert capsys.readouterr().out.count("skipped: CometError: no room") == 3
    assert not path.exists()
    with pytest.raises(SystemExit):
        defaults.main([*options, "--seconds", "0"])
    assert "3 layers are left for another run, from tiny W=2 T=16 E=8 on" in capsys.readouterr().out


def test_virtual_ranks_have_a_link_and_real_gpus_have_none(cupy):
    from benchmarks import defaults

    cupy.cuda.runtime.getDeviceCount.return_value = 2
    args = defaults.parse(["--ranks", "1,2,8", "--tp", "2"])
    worlds = [(ranks.size, ranks.link) for ranks in defaults.worlds(args)]
    assert worlds == [(1, None), (2, None), (8, "h100")]
    names = [str(layer) for layer in defaults.layers_of(args, 8, "h100")]
    assert names[0] == "qwen3-30b-a3b W=8 TP=2 T=8192 link=h100 E=128"
    assert [name.split("E=")[1] for name in names[-2:]] == ["256", "64"]
    assert not list(defaults.layers_of(args, 1, None))
    args = defaults.parse(["--ranks", "4", "--link", "none"])
    assert [ranks.link for ranks in defaults.worlds(args)] == [None]


# ---- rivals ----------------------------------------------------------------------------------


ARGS = argparse.Namespace(passes=["forward"], rounds=3, idle_ms=1.0, sustain_sec=0.0)


def test_a_rival_that_is_not_there_or_fails_says_so(monkeypatch):
    cell = Cell("mixtral-8x7b", ranks=2)
    monkeypatch.setattr(rivals.importlib.util, "find_spec", lambda name: None)
    rows = rivals.measure_rival("torch", [cell], ARGS, 1)
    assert [row["contender"] for row in rows] == ["torch dedup", "torch pairs"]
    assert {row["skipped"] for row in rows} == {"torch is not installed"}

    monkeypatch.setattr(rivals.importlib.util, "find_spec", lambda name: name)
    for code, outcome in (
        ("import sys; sys.exit(3)", "failed with exit code 3"),
        ("import time; time.sleep(60)", "stopped after 0.5 s"),
    ):
        monkeypatch.setattr(rivals, "command", lambda *_, code=code: [sys.executable, "-c", code])
        (row,) = rivals.measure_rival("jax", [cell], ARGS, 0.5)
        assert row["skipped"] == outcome


def test_rows_of_a_rival_join_the_table(tmp_path, monkeypatch):
    cell = Cell("mixtral-8x7b", ranks=2)
    code = """
import sys
from pathlib import Path
from benchmarks.rivals import Rows
from cometrt.bench.workloads import Cell
Rows(Path(sys.argv[1])).add(Cell("mixtral-8x7b", 2), "forward", "jax ragged", [2.0, 3.0, 4.0], 2.5)
"""
    monkeypatch.setattr(rivals.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(
        rivals, "command", lambda rival, cells, args, out: [sys.executable, "-c", code, out]
    )
    (row,) = rivals.measure_rival("jax", [cell], ARGS, 30)
    assert (row["model"], row["tokens"], row["ranks"]) == ("mixtral-8x7b", 8192, 2)
    results = records.Results(tmp_path / "peers_2.json", MACHINE)
    results.add(str(cell), {"forward": entry(cell, {"fused": 1.5})})
    results.add_rival(row)
    kept = records.read(tmp_path / "peers_2.json")["cells"][str(cell)]["forward"]
    isolated = {"median": 3.0, "p10": 2.0, "p90": 4.0}
    assert kept["times"]["jax ragged"] == {"isolated": isolated, "sustained": 2.5}
    assert records.figures(kept)["over jax ragged"] == pytest.approx(2)
    assert "jax ragged" in records.line(str(cell), "forward", kept)


def test_a_rival_understands_how_it_is_started(cupy, tmp_path):
    cells = [Cell("qwen2-moe", ranks=4, skew=0.4), Cell("mixtral-8x7b", ranks=4, tokens=256)]
    given = argparse.Namespace(passes=["forward", "both"], rounds=3, idle_ms=1.5, sustain_sec=0.5)
    command = rivals.command("torch", cells, given, tmp_path / "rows.json")
    assert command[1:5] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4"]
    at = command.index("benchmarks.rivals_torch")
    args = rivals.parse(None, command[at + 1 :])
    assert (args.cells, args.passes) == (cells, given.passes)
    assert args.method == Method(3, 1.5, 0.5)
    assert args.out == tmp_path / "rows.json"


# ---- figures, files and tables -----------------------------------------------------------------

MS = {"fused": 10.0, "sequential": 15.0, "chunked 2": 13.0, "chunked 4": 12.0, "gemms": 8.0}


def entry(cell, ms, **more):
    times = {name: {"isolated": records.spread([value])} for name, value in ms.items()}
    facts = {"cell": vars(cell), "link_ms": 3.0, "busiest_rank": 1.0, "config": None}
    facts |= {"machine": MACHINE, "flops": 5e12, "times": times}
    return facts | more


def test_figures():
    found = records.figures(entry(Cell("mixtral-8x7b"), MS | {"planning": 0.2}))
    assert found["over sequential"] == pytest.approx(1.5)
    assert found["over chunked"] == pytest.approx(1.2)
    assert found["efficiency"] == pytest.approx(0.8)
    assert found["hidden"] == pytest.approx(2 / 3)
    assert found["planning"] == pytest.approx(0.02)
    little = records.figures(entry(Cell("mixtral-8x7b"), MS, link_ms=1.1))
    assert "hidden" not in little
    slow_link = records.figures(entry(Cell("mixtral-8x7b"), MS, link_ms=9.0))
    assert slow_link["efficiency"] == pytest.approx(0.9)
    alone = entry(Cell("mixtral-8x7b"), {"fused": 10.0})
    assert records.figures(alone) == {}
    assert records.tflops(alone, "fused") == pytest.approx(500)
    assert records.tflops(alone, "nccl") is None


def test_results_are_kept_by_pass_and_measured_once(tmp_path):
    path, cell = tmp_path / "layer.json", Cell("mixtral-8x7b")
    results = records.Results(path, MACHINE)
    results.add("a", {"forward": entry(cell, MS)})
    results.skip("b", MemoryError("no room"))
    assert results.has("a", ["forward"])
    assert results.has("b", ["forward", "both"])
    assert not results.has("a", ["forward", "both"])
    later = records.Results(path, MACHINE | {"commit": "def"})
    assert not later.has("a", ["forward"])
    assert not later.has("b", ["forward"])
    facts = {key: value for key, value in entry(cell, MS).items() if key != "machine"}
    later.add("a", {"both": facts})
    later.add("b", {"both": facts})
    data = json.loads(path.read_text())
    assert data["cells"]["a"]["forward"]["machine"]["commit"] == "abc"
    assert data["cells"]["a"]["both"]["machine"]["commit"] == "def"
    assert data["skipped"] == {}


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Write a result file."""
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    return lambda name, data: (tmp_path / name).write_text(json.dumps(data))


def test_the_table_of_virtual_ranks(results):
    cell = Cell("mixtral-8x7b")
    found = entry(cell, MS | {"planning": 0.2})
    found["times"]["fused"]["sustained"] = 12.5
    other = entry(cell, MS, machine=MACHINE | {"commit": "def"}, link_ms=1.1)
    other["step_bytes"] = {"fused": {"total": 3.21e9}, "sequential": {"total": 4e9}}
    cells = {"a": {"forward": found}, "b": {"forward": other, "both": entry(cell, {"fused": 20.0})}}
    results("layer.json", {"cells": cells, "skipped": {"c": {}}})
    lines = tables.layers_table()
    assert lines[0].startswith("A GPU, 2026-01-01 cut into virtual ranks;")
    assert lines[4:7] == [
        "| a | forward | 500, 400 | 333 | 417 (4) | 625 | 1.50 | 1.20 | 0.80 | 0.67 | 2.0% | 1.00 "
        "| - | abc |",
        "| b | forward | 500 | 333 | 417 (4) | 625 | 1.50 | 1.20 | 0.80 | little | - | 1.00 "
        "| 3.21, 4.00 | def |",
        "| b | both | 250 | - | - | - | - | - | - | - | - | 1.00 | - | abc |",
    ]
    assert "Geometric mean over chunked: 1.20." in lines
    assert lines[-1].endswith("did not fit: c.")


def test_the_tables_of_several_gpus(results):
    four, two = Cell("mixtral-8x7b", ranks=4), Cell("mixtral-8x7b", ranks=2)
    found = entry(four, MS | {"nccl": 20.0, "torch dedup": 11.0}, config={"order": "columns"})
    found["times"]["jax ragged"] = {"skipped": "jax is not installed"}
    emulated = entry(four, {"fused": 12.5, "gemms": 10.0, "sequential": 25.0})
    results("peers_4.json", {"cells": {"a": {"forward": found}}})
    results("peers_2.json", {"cells": {"b": {"forward": entry(two, {"fused": 10.0})}}})
    results("link_emulation_4.json", {"cells": {"a link=h200": {"forward": emulated}}})
    lines = tables.peers_table()
    assert lines[4:6] == [
        "| a | forward | 500 | 333 | 417 (4) | 250 | 455 | - | - | 625 | 1.10 | abc |",
        "| b | forward | 500 | - | - | - | - | - | - | - | - | abc |",
    ]
    assert lines[-1] == "Not measured: jax ragged (jax is not installed)."
    assert tables.overlap_table()[4:] == [
        "| a | 3.00 | - | 0.80 | 0.67 | columns | 500, 625, 1.50 | 400, 500, 2.00 | abc |",
        "| b | 3.00 | - | - | - | - | 500, 0, - | - | abc |",
    ]


def test_the_table_of_passes(results):
    cell = Cell("mixtral-8x7b", ranks=4)
    both = entry(cell, MS, step_bytes={"fused": {"total": 2.5e9}})
    results("passes_4.json", {"cells": {"a": {"forward": entry(cell, MS), "both": both}}})
    assert tables.passes_table()[4:] == [
        "| a | forward | 500 | 333 | - | abc |",
        "| a | both | 500 | 333 | 2.50, - | abc |",
    ]
    assert "fused              2.50 GB at the peak of a step" in records.line("a", "both", both)


def test_the_short_table(results):
    cells = {
        f"{model} W=4 T=8192": {
            which: entry(Cell(model, ranks=4), MS) for which in ("forward", "backward")
        }
        for model in tables.SHORT_MODELS
    }
    results(tables.SHORT_FILE, {"cells": cells})
    shape = stacks.Stack("qwen3-30b-a3b", 4, 2, 4096, 2)
    times = {
        name: {"ms": {"median": ms}, "without_ms": 1.0, "losses": [1.0]}
        for name, ms in (("fused", 10.0), ("jax batched", 12.5))
    }
    stack = {"stack": dataclasses.asdict(shape), "times": times, "machine": MACHINE}
    results("end_to_end.json", {"cells": {"a": stack}})
    assert tables.short_table() == [
        "| layer | forward: sequential, fused | backward: sequential, fused "
        "| Transformer step, ms: JAX, fused |",
        "|---|---|---|---|",
        "| qwen3-30b-a3b | 333, 500 | 333, 500 | 12.5, 10.0 |",
        "| mixtral-8x7b | 333, 500 | 333, 500 | - |",
        "",
        "4 x A GPU, 2026-01-01, at abc; 8192 tokens a GPU, bfloat16, TFLOP/s per GPU; the slowest "
        "GPU counts.",
    ]


def test_the_table_of_the_link(results):
    rates = {"copy engine": 387.1, "NCCL": None, "pull": {"1": 50.0, "16": 371.0}}
    data = {"machine": MACHINE, "ranks": 4, "gbps": rates, "us": {"hop": 2.011}}
    results("link.json", data)
    assert tables.link_table()[2:] == [
        "|  | its own choice | 1 | 16 |",
        "|---|---|---|---|",
        "| copy engine | 387 |  |  |",
        "| NCCL |  |  |  |",
        "| pull |  | 50 | 371 |",
        "",
        "Microseconds: hop 2.01.",
    ]


def test_the_table_of_small_batches(results):
    assert tables.latency_table() == ["Not measured yet."]
    facts = {"us": {"p50": 101.4, "p99": 120.0}, "limit_us": 126.0, "read_us": 67.3}
    launched = {"publish": 8.2, "prepare": 12.0}
    cells = {
        "a": {"inference": facts | {"machine": MACHINE, "launches_us": launched}},
        "b": {"inference": facts | {"machine": MACHINE, "launches_us": {}}},
    }
    results("latency_4.json", {"cells": cells, "skipped": {}})
    assert tables.latency_table()[4:] == [
        "| a | 101 | 120 | 126 | 67 | publish 8, prepare 12 | abc |",
        "| b | 101 | 120 | 126 | 67 | - | abc |",
    ]


def test_the_table_of_small_batches_beside_others(results):
    assert tables.small_table() == ["Not measured yet."]
    found = entry(Cell("mixtral-8x7b", ranks=2, tokens=8), {"fused": 0.15, "jax ragged": 1.5})
    found["times"]["torch pairs"] = {"skipped": "no PyTorch"}
    found["times"]["fused"]["sustained"] = 0.125
    results("small_2.json", {"cells": {"a": {"backward": found}}})
    assert (
        tables.small_table()[2] == "| layer | pass | fused | PyTorch, every pair | JAX | commit |"
    )
    assert tables.small_table()[4:] == ["| a | backward | 150, 125 | - | 1,500 | abc |"]


def test_the_table_of_several_nodes(results):
    assert tables.nodes_table() == ["Not measured yet."]
    ms = {"nodes, 1": 3.0, "nodes, 3, wanted": 2.0, "node alone": 1.0, "rail alone": 2.5}
    cell = {"times": {"forward": ms}, "hidden": {"forward": {"nodes, 1": 0.5}}, "rail_gbps": 35.2}
    results("nodes_2.json", {"machine": MACHINE, "cells": {"a": cell | {"limit": 1}}})
    assert tables.nodes_table()[4:] == [
        "| a, limit 1 | 35 | forward | 1: 3.00 (0.50), 3, wanted: 2.00 | 1.00 | 2.50 | - "
        "| - | abc |"
    ]


def test_the_weights_of_small_batches(cupy):
    from benchmarks import latency

    spec = Cell("qwen3-30b-a3b", 4, tokens=2).spec
    ids = np.array([[[0, 1, 40]], [[31, 32, 127]], [[0, 1, -1]], [[2, 2, 96]]])
    found = [latency.touched_experts(Geometry(spec, rank, 4), ids) for rank in range(4)]
    assert found == [4, 2, 0, 2]


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        (["--models", "mixtral"], "(got mixtral)"),
        (["--tokens", "1,64", "--max-tokens", "32"], "must be at least 64 (got 32)"),
    ],
)
def test_batches_must_fit(options, wrong):
    found = start("latency", *options)
    assert found.returncode == 2
    assert wrong in found.stderr.splitlines()[-1]


SWEPT = {
    "combinations": 768, "timed": 600, "slowest_ms": 3.0, "default_ms": 1.5, "tuned_ms": 1.02,
    "best_ms": 1.0, "slower_percent": 2.0,
}  # fmt: skip


def test_the_table_of_the_sweep(results):
    assert tables.sweep_table() == ["Not measured yet."]
    found = {"machine": MACHINE, "tune_sec": 44.6, "passes": {"forward": SWEPT, "backward": SWEPT}}
    results("sweep.json", {"cells": {"a": found}})
    lines = tables.sweep_table()
    assert lines[0].startswith("A GPU, 2026-01-01; ")
    assert lines[4:] == [
        f"| a | {which} | 1.020 | 1.000 | 2.0% | 1.500 | 600 of 768 | 45 | abc |"
        for which in ("forward", "backward")
    ]
    found["with_configs_of"] = {"a": 2.0, "b": 2.1}
    results("sweep.json", {"cells": {"a": found}})
    assert tables.sweep_table()[: len(lines)] == lines
    assert tables.sweep_table()[-1] == "| a | b | 2.100 | 2.000 | 5.0% |"


class Trial:
    """Stands in for trials: columns take one millisecond, all others two."""

    def __init__(self, *_):
        self.elapsed_sec = 0.0

    def time(self, config, which, counts=None):
        order = (config if which == "forward" else config.of_backward()).order
        return 1.0 if order == "columns" else 2.0

    def close(self):
        pass


@pytest.mark.parametrize("found", [{}, {"order": "columns", "n_chunk": 512}], ids=str)
def test_a_sweep_says_how_much_slower_the_tuned_config_is(found, cupy, monkeypatch, tmp_path):
    """It is what the search of `layer.tune` finds, which is another function here."""
    from benchmarks import sweep

    tuned, asked, out = cometrt.TileConfig(**found), [], tmp_path / "sweep.json"

    def find(world, geometry, index, base, inputs, training, budget_sec):
        asked.append((geometry.spec, base, inputs, training, budget_sec))
        return Found(tuned, {}, {})

    spec = cometrt.MoESpec(hidden=1024, intermediate=32, num_experts=4, topk=2, max_tokens=8)
    monkeypatch.setattr(Cell, "spec", spec)
    monkeypatch.setattr(sweep, "find", find)
    monkeypatch.setattr(sweep, "Trials", Trial)
    monkeypatch.setattr(sweep, "num_sms", lambda: 16)
    monkeypatch.setattr(sweep, "machine", lambda: MACHINE)
    monkeypatch.setattr(
        sweep, "legal", lambda base, change, *_: dataclasses.replace(base, **change)
    )
    monkeypatch.setattr(sweep, "free_memory", lambda devices: None)
    given = ["--models", "mixtral-8x7b", "--tokens", "8", "--budget-sec", "7", "--out", str(out)]

    class Ranks:
        rank, size, link, devices = 0, 2, None, list

        def run(self, fn, device, timeout_sec):
            return cometrt.spawn(fn, 2)[0]

    monkeypatch.setattr(sweep, "worlds", lambda args: [Ranks()])
    out.write_text(json.dumps({"cells": {"earlier": 1}}))
    sweep.main(given)
    assert asked == 2 * [(spec, cometrt.TileConfig(), None, True, 7.0)]
    cells = json.loads(out.read_text())["cells"]
    entry = cells.pop("mixtral-8x7b W=2 T=8")
    assert cells == {"earlier": 1}
    percent = 0.0 if found else 100.0
    for passed in entry["passes"].values():
        assert passed["slower_percent"] == percent
        assert (passed["best_ms"], passed["tuned_ms"]) == (1.0, 1.0 if found else 2.0)
    assert entry["tuned"] == dataclasses.asdict(tuned)
    assert sweep.summary({"a": entry})[1:] == [
        f"    {percent:.1f}% forward, {percent:.1f}% backward: a",
        f"    at most {percent:.1f}%",
    ]


def test_the_documents_have_the_tables_of_the_results():
    tables.main(["--check"])
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    for name in tables.PAGES["docs/benchmarks.md"]:
        assert f"<!-- table: {name} -->\n" in text


RATES = {"engine": 800.0, "torch": 640.0, "batched": 700.0, "dense": 750.0}
RATES |= {"skewed": 780.0, "torch skewed": 600.0}
GEMM = {"tflops": RATES, "ms": {"engine": {"median": 2.0}}}


def engine_table_of(shapes, folder, monkeypatch):
    (folder / "engine.json").write_text(json.dumps({"machine": MACHINE, "shapes": shapes}))
    monkeypatch.setattr(tables, "RESULTS", folder)
    return tables.engine_table()


def test_the_table_of_the_engines_forward(tmp_path, monkeypatch):
    lines = engine_table_of({"mixtral-8x7b up": GEMM}, tmp_path, monkeypatch)
    assert lines[4:] == [
        "| mixtral-8x7b up | 800 | 640 | 700 | 1.143 | 780 (torch 600) | 750 |",
        "",
        "Geometric mean over the better peer: 1.143.",
    ]


def test_the_table_of_the_engines_backward(tmp_path, monkeypatch):
    ms = {name: {"median": t} for name, t in (("engine", 2.0), ("fp32+", 3.0), ("bf16+", 2.2))}
    wgrad = {"tflops": RATES, "ms": ms, "copy_ms": {"fp32+": 2.5, "bf16+": 1.5}}
    shapes = {"phi up": GEMM, "phi up dgrad": GEMM | {"copy_ms": {}}, "phi up wgrad": wgrad}
    lines = engine_table_of(shapes, tmp_path, monkeypatch)
    first = lines.index("The backward's:")
    rates = "800 | 640 | 700 | 1.143 | 780 (torch 600) | 750"
    assert sum("phi" in line for line in lines[:first]) == 1
    assert lines[first + 4 :] == [
        f"| phi up dgrad | {rates} | - |",
        f"| phi up wgrad | {rates} | fp32+ 1.50 (1.20), bf16+ 1.10 |",
        "",
        "Geometric mean over the better peer: 1.143.",
    ]


def test_every_result_file_is_in_a_table():
    known = (
        "engine.json",
        "layer.json",
        "link.json",
        "end_to_end.json",
        "sweep.json",
        "jax_step.json",
    )
    known += ("peers_", "passes_", "link_emulation_", "latency_", "small_", "nodes_")
    for path in tables.RESULTS.iterdir():
        assert path.name.startswith(known), path


def test_a_check_writes_nothing(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text("<!-- table: one -->\nold\n<!-- end -->\n")
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "PAGES", {"page.md": ("one",)})
    monkeypatch.setattr(tables, "TABLES", {"one": lambda: ["new"]})
    with pytest.raises(SystemExit, match="page"):
        tables.main(["--check"])
    assert "old" in page.read_text()
    tables.main([])
    assert "new" in page.read_text()


# ---- a host with several GPUs -------------------------------------------------------------------


def test_every_step_of_a_host_is_a_command_that_exists(capsys):
    with pytest.raises(SystemExit, match="0"):
        all_gpus.main(["--gpus", "8", "--gpu", "h100", "--dry-run"])
    said = capsys.readouterr().out.splitlines()
    assert len([line for line in said if "-n 8" in line]) == 6
    assert len([line for line in said if "RANKS_PER_NODE=4" in line]) == 2
    for step in all_gpus.steps_of(8, "h100", 1.0):
        named = [part for part in step.command if part.endswith(".py")]
        assert all((ROOT / part).exists() for part in named)
        modules = [part for part in step.command if part.startswith("benchmarks.")]
        assert all((ROOT / part.replace(".", "/")).with_suffix(".py").exists() for part in modules)
        assert named or modules or "tests.multi.run_cuda_nodes" in step.command


def test_a_step_that_fails_or_hangs_is_told(monkeypatch, capsys):
    code, sleep = [sys.executable, "-c", "raise SystemExit(3)"], "import time; time.sleep(9)"
    steps = [
        all_gpus.Step("one", code, 60.0),
        all_gpus.Step("two", [sys.executable, "-c", sleep], 0.2),
        all_gpus.Step("three", [sys.executable, "-c", ""], 60.0),
    ]
    monkeypatch.setattr(all_gpus, "steps_of", lambda *_: steps)
    with pytest.raises(SystemExit, match="1"):
        all_gpus.main(["--steps", "one,two,three", "--gpus", "2", "--gpu", "h100"])
    said = capsys.readouterr().out
    assert "one: failed with 3" in said
    assert "two: was stopped after 0 s" in said
    assert "three: passed" in said
