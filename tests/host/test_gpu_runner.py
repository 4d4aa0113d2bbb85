"""`python -m tests.gpu`, without a GPU: pytest is a stand-in."""

import collections
import json
import os
import subprocess
import sys
import time

import pytest

import cometrt
from cometrt.kernels import compiler
from tests import compile_all, gpu
from tests.launch import ROOT, environment


def test_every_device_test_is_in_one_of_the_lists():
    one, two, every = gpu.jobs_of([""])
    files = {job.path for job in one + two + every}
    assert sorted(files) == sorted(gpu.FOLDER.glob("test_*.py"))
    assert {job.path.name for job in two} == set(gpu.WITH_TWO_GPUS)
    assert {job.path.name for job in every} == set(gpu.WITH_ALL_GPUS)
    assert set(gpu.SECONDS) <= {path.name for path in files}
    for path in files:
        parts = [job for job in one + two + every if job.path == path]
        assert sorted(job.part for job in parts) == list(range(1, parts[0].parts + 1))
        assert {job.parts for job in parts} == {len(parts)}
    assert [job.path.name for job in gpu.jobs_of(["peers", "cli"])[1]] == ["test_cli.py"]


def test_the_longest_come_first_and_long_files_are_several(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "SECONDS", {"test_layer.py": 100, "test_plan.py": 40})
    stand_in = StandIn(monkeypatch, ["0"])
    match = ["--match", "layer,test_plan.py,memory", "--keep", str(tmp_path / "kept")]
    assert stand_in.main(*match) == 0
    layer, plan = [("test_layer.py", "1/2"), ("test_layer.py", "2/2")], ("test_plan.py", "1/1")
    assert stand_in.jobs() == [("test_memory.py", "1/1"), *layer, plan]
    kept = json.loads((tmp_path / "kept").read_text())
    assert all(0 <= seconds < 10 for seconds in kept["seconds"].values())
    kept |= {"passed": [], "seconds": {"test_plan.py": 80, "test_layer.py 2/2": 70}}
    (tmp_path / "kept").write_text(json.dumps(kept))
    assert stand_in.main(*match) == 0
    assert stand_in.jobs() == [plan, layer[1], ("test_memory.py", "1/1"), layer[0]]


def test_parts_of_a_file_are_all_of_its_tests():
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-k", "not counted"]
    found = []
    for part in ("1/1", "1/3", "2/3", "3/3"):
        result = subprocess.run(
            [*command, "tests/host/test_dlpack.py", f"--part={part}"],
            capture_output=True, text=True, cwd=ROOT, env=environment(),
        )  # fmt: skip
        found.append([line for line in result.stdout.splitlines() if "::" in line])
    whole, *parts = found
    assert len(whole) > 5
    assert whole == [*parts[0], *parts[1], *parts[2]]
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_command_ends_with_all_that_it_started(tmp_path):
    child = "import time; time.sleep(60)"
    code = f"""
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {child!r}])
print(os.environ["CUDA_VISIBLE_DEVICES"], os.environ["OPENBLAS_NUM_THREADS"], child.pid, flush=True)
time.sleep(60)
"""
    begin = time.monotonic()
    status, output = gpu.run([sys.executable, "-c", code], "1,2", 3.0, threads=7)
    assert (status, time.monotonic() - begin < 30) == (-1, True)
    gpus, threads, child_pid = output.split()
    assert (gpus, threads) == ("1,2", os.environ.get("OPENBLAS_NUM_THREADS", "7"))
    for _ in range(100):  # until it is gone, or a zombie that nobody waits for
        try:
            with open(f"/proc/{child_pid}/stat") as file:
                if file.read().rsplit(")", 1)[1].split()[0] == "Z":
                    return
        except FileNotFoundError:
            return
        time.sleep(0.1)
    raise AssertionError("the child runs on")


class StandIn:
    """Pytest: notes what it runs; `status` by file, 0 by default."""

    def __init__(self, monkeypatch, gpus=("0", "1", "2", "3"), **status):
        self.ran, self.status = [], status
        monkeypatch.setattr(gpu, "run", self.run)
        monkeypatch.setattr(gpu, "compile_kernels", lambda: None)
        monkeypatch.setattr(gpu, "visible_gpus", lambda: list(gpus))

    def run(self, command, gpus, limit_sec, threads):
        name = os.path.basename(command[5])
        self.ran.append((name, command[6], gpus))
        time.sleep(0.02)
        test = f"tests/device/{name}::test_a"
        return self.status.get(name[5:-3], 0), f"output of {name}\n3.25s call     {test}\n3 passed"

    def jobs(self):
        return [(name, part.removeprefix("--part=")) for name, part, _ in self.ran]

    def main(self, *arguments):
        """Its exit status; `ran` begins again."""
        self.ran.clear()
        with pytest.raises(SystemExit) as end:
            gpu.main(list(arguments))
        return end.value.code


@pytest.mark.parametrize("status", [0, 1, -1, gpu.NO_TESTS])
def test_jobs_are_spread_over_gpus_and_failures_are_told(monkeypatch, capsys, status):
    stand_in = StandIn(monkeypatch, layer=status)
    failed = status in (1, -1)
    assert stand_in.main("--match", "layer,orders,plan,cli,pairs,peers", "-x") == failed
    said = capsys.readouterr().out
    assert ("output of test_layer.py" in said) == failed
    assert ("failed: test_layer.py" in said) == failed
    assert said.splitlines()[-1].endswith("not all passed" if failed else ": all passed")
    assert "     3.2 s tests/device/test_layer.py::test_a" in said
    gpus = collections.defaultdict(set)
    for name, _, on in stand_in.ran:
        gpus[name].add(on)
    assert gpus["test_cli.py"] | gpus["test_jax_pairs.py"] == {"0,1", "2,3"}
    assert stand_in.ran[-1] == ("test_peers.py", "--part=1/1", "0,1,2,3")
    others = set(gpus) - {"test_cli.py", "test_jax_pairs.py", "test_peers.py"}
    assert set.union(*(gpus[name] for name in others)) == {"0", "1", "2", "3"}
    wanted = gpu.jobs_of(["layer", "orders", "plan", "cli", "pairs", "peers"])
    assert len(stand_in.jobs()) == len(set(stand_in.jobs())) == sum(map(len, wanted))


def test_what_has_passed_on_the_same_tree_is_passed_over(monkeypatch, capsys, tmp_path):
    keep, tree = tmp_path / "out" / "passed.json", tmp_path / "results" / "tree"
    (tree / "cometrt").mkdir(parents=True)
    (tree / "cometrt" / "layer.py").write_text("1")
    (tree / "pyproject.toml").write_text("2")
    monkeypatch.setattr(gpu, "ROOT", tree)
    stand_in = StandIn(monkeypatch, memory=1)
    options = ["--match", "memory,stats,peers", "--keep", str(keep)]

    assert stand_in.main(*options) == 1
    assert {name for name, *_ in stand_in.ran} == {
        "test_memory.py", "test_stats.py", "test_peers.py"
    }  # fmt: skip
    assert set(json.loads(keep.read_text())["passed"]) == {
        "test_stats.py", "test_peers.py on 4 GPUs"
    }  # fmt: skip
    capsys.readouterr()

    assert stand_in.main(*options) == 1  # what failed is not passed over
    assert [name for name, *_ in stand_in.ran] == ["test_memory.py"]
    said = capsys.readouterr().out.splitlines()
    assert "passed earlier: test_peers.py on 4 GPUs, test_stats.py" in said
    assert said[-1].endswith("2 passed earlier: not all passed")

    stand_in.status.clear()
    assert stand_in.main(*options) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("2 passed earlier: all passed")
    assert stand_in.main(*options) == 0
    assert stand_in.ran == []

    monkeypatch.setattr(gpu, "visible_gpus", lambda: ["0", "1"])  # of other ranks
    assert stand_in.main(*options) == 0
    assert [name for name, *_ in stand_in.ran] == ["test_peers.py"]

    assert stand_in.main(*options, "-k", "some") == 0  # other tests
    assert len(stand_in.ran) == 3
    assert stand_in.main(*options) == 0
    assert len(stand_in.ran) == 3

    (tree / "cometrt" / "__pycache__").mkdir()
    (tree / "cometrt" / "__pycache__" / "layer.pyc").write_text("3")
    (tree / "benchmarks" / "results").mkdir(parents=True)
    (tree / "benchmarks" / "results" / "passes.json").write_text("{}")
    assert stand_in.main(*options) == 0
    assert stand_in.ran == []
    (tree / "cometrt" / "layer.py").write_text("4")
    assert stand_in.main(*options) == 0
    assert len(stand_in.ran) == 3


def test_nothing_begins_that_would_end_late(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "SECONDS", {"test_memory.py": 20, "test_stats.py": 5})
    stand_in = StandIn(monkeypatch)
    assert stand_in.main("--match", "memory,stats", "--within-sec", "10") == 1
    assert [name for name, *_ in stand_in.ran] == ["test_stats.py"]
    said = capsys.readouterr().out
    assert "not begun: test_memory.py" in said
    assert said.endswith("not all passed\n")


def test_outputs_are_kept(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "SECONDS", {"test_layer.py": 100})
    StandIn(monkeypatch).main("--match", "test_layer", "--logs", str(tmp_path / "logs"))
    logs = {path.name: path.read_text() for path in (tmp_path / "logs").iterdir()}
    assert set(logs) == {"test_layer.py-1-of-2.txt", "test_layer.py-2-of-2.txt"}
    assert all(text.startswith("output of test_layer.py") for text in logs.values())


@pytest.mark.parametrize(
    ("count", "pairs"), [(1, ["0"]), (2, ["0,1"]), (3, ["0,1"]), (4, ["0,1", "2,3"])]
)
def test_pairs_of_gpus(count, pairs):
    gpus = [str(index) for index in range(count)]
    assert gpu.groups_of(gpus, 2) == pairs
    assert gpu.groups_of(gpus, 1) == gpus
    assert gpu.groups_of(gpus, count) == [",".join(gpus)]


@pytest.mark.parametrize("code", ["", "not C++"])
def test_all_kernels_are_compiled_first(monkeypatch, tmp_path, code):
    pytest.importorskip("cuda.bindings", reason="needs the compile extra")
    for name in ("one", "two"):
        (tmp_path / f"{name}.cu").write_text(code)
    cached = tmp_path / "cache"
    monkeypatch.setattr(compile_all, "builds", lambda: [("one.cu", (("A", 1),)), ("two.cu", ())])
    monkeypatch.setattr(compiler, "kernels_folder", lambda: tmp_path)
    monkeypatch.setenv("COMETRT_CACHE_DIR", str(cached))
    if code:
        with pytest.raises(cometrt.CometError, match="could not compile"):
            compile_all.main()
        return
    compile_all.main()
    assert sorted(path.name[:4] for path in cached.glob("*.cubin")) == ["one-", "two-"]


def test_a_kernel_that_does_not_compile_ends_it(monkeypatch):
    stand_in = StandIn(monkeypatch)
    monkeypatch.undo()
    monkeypatch.setattr(gpu, "run", stand_in.run)
    monkeypatch.setattr(gpu, "visible_gpus", lambda: ["0"])
    monkeypatch.setattr(subprocess, "call", lambda command, cwd: 1)
    assert stand_in.main("--match", "memory") == "a kernel does not compile"
    assert stand_in.ran == []


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr(gpu, "visible_gpus", list)
    with pytest.raises(SystemExit, match="no NVIDIA GPU"):
        gpu.main([])
