"""The command line: what each command prints, its JSON, and its exit status."""

import dataclasses
import json
import os
import subprocess
import sys
import time

import pytest

import cometrt
from cometrt.models import MODELS, scaled_spec
from cometrt.specs import SAVE_MODES
from tests.launch import ROOT, mpirun

COMMANDS = "doctor demo bench tune trace memory".split()

pytest.importorskip("typer", reason="needs the cli extra")
from cometrt.cli import checks, doctor, inputs, main, probes, ranks  # noqa: E402


@pytest.fixture
def cli(capsys, tmp_path, monkeypatch):
    """cli(line) -> (exit status, stdout, stderr), in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def call(line):
        with pytest.raises(SystemExit) as ended:
            main(line.split())
        printed = capsys.readouterr()
        return ended.value.code or 0, printed.out, printed.err

    return call


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)


def test_each_command_has_help_and_json(cli):
    status, listed, _ = cli("--help")
    assert status == 0
    for command in COMMANDS:
        assert f" {command} " in listed
        status, printed, _ = cli(f"{command} --help")
        assert status == 0
        assert "--json" in printed


def test_python_m_is_the_same():
    command = [sys.executable, "-m", "cometrt", "memory", "--json"]
    found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)["model"] == "qwen3-30b-a3b"


@pytest.mark.parametrize(
    "line",
    [
        "memory --model none", "memory --ranks 3", "memory --tokens 0", "demo --scale 0", "nothing",
        "trace --rank 9 --device host --scale 64 --tokens 8", "bench --device gpu", "tune --tp 3",
        "tune --device host",
    ],
)  # fmt: skip
def test_wrong_arguments_have_status_2(cli, line, no_gpu):
    if line.startswith("tune --tp"):
        line += " --device cuda"
    status, printed, problem = cli(line)
    assert status == 2
    assert printed == ""
    assert "rror" in problem


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("bench --model mixtral", ("--model", "mixtral-8x7b", "(got 'mixtral')")),
        ("bench --device cuda", ("needs an NVIDIA GPU", "cuda13")),
    ],
)
def test_errors_say_what_to_write_instead(cli, line, words, no_gpu):
    status, _, problem = cli(line)
    assert status == 2
    assert all(word in problem for word in words), problem


# ---- memory ------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", SAVE_MODES)
def test_memory_is_that_of_the_spec(cli, save):
    line = "memory --model mixtral-8x7b --ranks 4 --tp 2 --tokens 512 --tokens 1024 --json"
    status, printed, _ = cli(f"{line} --save {save}")
    assert status == 0
    found = json.loads(printed)["bytes"]
    assert list(found) == ["512", "1024"]
    spec = scaled_spec("mixtral-8x7b", max_tokens=1024, tp=2, save=save)
    memory = spec.memory(4)
    assert found["1024"]["heap"] == memory.heap
    assert found["1024"]["residuals"] == memory.residuals
    assert found["1024"]["total"] == memory.total + memory.weights


@pytest.mark.parametrize("model", MODELS)
def test_memory_as_a_table(cli, model):
    status, printed, _ = cli(f"memory --model {model}")
    assert status == 0
    assert "heap" in printed
    assert "GiB" in printed
    assert "residuals" not in cli(f"memory --model {model} --inference")[1]


# ---- commands that run layers --------------------------------------------------------------------


@pytest.mark.parametrize("command", ["demo", "trace"])
def test_a_file_in_the_place_of_the_folder_is_said_at_once(cli, tmp_path, command, monkeypatch):
    monkeypatch.setattr("cometrt.MoELayer", None)  # no layer is made
    (tmp_path / "out").write_text("")
    status, _, problem = cli(f"{command} --device host --scale 64 --tokens 8 --out {tmp_path}/out")
    assert status == 2
    assert "--out must be a folder (got" in problem


def test_demo(cli, tmp_path):
    status, printed, _ = cli("demo --device host --ranks 2 --scale 64 --tokens 32 --json")
    assert status == 0
    found = json.loads(printed)
    assert [of["error"] < 1e-2 for of in found["ranks"]] == [True, True]
    assert sum(of["rows"] for of in found["ranks"]) == 2 * 32 * 8
    assert 0 <= found["hidden_share"] <= 1
    events = json.loads((tmp_path / "out" / "timeline.json").read_text())["traceEvents"]
    assert len(events) > found["events"] > 10


def test_wrong_results_have_status_1(cli, monkeypatch):
    monkeypatch.setattr(inputs, "tolerance", lambda spec: 1e-9)
    status, printed, problem = cli("demo --device host --ranks 2 --scale 64 --tokens 32 --json")
    assert status == 1
    assert printed == ""
    assert "wrong results" in problem


def test_commands_under_mpirun_speak_once():
    line = "demo --device host --scale 64 --tokens 16 --json --out /dev/null/nowhere"
    found = mpirun(2, "-m", "cometrt", *line.split(), timeout_sec=100)
    assert found.returncode != 0  # and none of the ranks waits for the others
    assert "/dev/null" in found.stderr
    found = mpirun(2, "-m", "cometrt", "memory", "--json")
    assert found.returncode == 0
    assert json.loads(found.stdout)["ranks"] == 8
    line = "bench --device host --model mixtral-8x7b --tokens 8 --rounds 1 --seconds 0 --json"
    found = mpirun(2, "-m", "cometrt", *line.split())
    assert found.returncode == 0
    assert json.loads(found.stdout)["ranks"] == 2


@pytest.mark.parametrize(("processes", "wanted"), [("1", "32"), ("2", None)])
def test_hardware_queues_are_asked_for_by_threads_alone(cli, monkeypatch, processes, wanted):
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "8")  # so that what is set goes in the end
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS")
    for name in ranks.SIZES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PMI_SIZE", processes)

    def stop(*_):
        raise SystemExit(5)

    monkeypatch.setattr("cometrt.cli.app.all_ranks", stop)
    assert cli("bench --device host")[0] == 5
    assert os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == wanted


def test_bench_measures_both_passes(cli):
    line = "bench --device host --model mixtral-8x7b --ranks 2 --tokens 8 --rounds 3 --seconds 0.01"
    status, printed, said = cli(line + " --json")
    assert status == 0
    passes = json.loads(printed)["passes"]
    assert list(passes) == ["forward", "backward", "both"]
    for which, entry in passes.items():
        assert f"measuring {which}" in said
        for mode in ("fused", "sequential"):
            assert entry["times"][mode]["isolated"]["median"] > 0
            assert entry["times"][mode]["sustained"] > 0
    status, printed, _ = cli(line)
    assert status == 0
    assert printed.count("sequential") == 3


def test_tune_without_a_gpu_is_skipped(cli, no_gpu):
    assert cli("tune") == (0, "no GPU: skipped\n", "")
    status, printed, _ = cli("tune --json")
    assert (status, json.loads(printed)) == (0, {"skipped": "no GPU"})


def test_trace_writes_a_picture_and_a_file_for_perfetto(cli, tmp_path):
    pytest.importorskip("matplotlib")
    line = "trace --device host --ranks 2 --scale 64 --tokens 16 --out there"
    status, printed, _ = cli(line + " --json")
    assert status == 0
    found = json.loads(printed)
    assert (tmp_path / found["picture"]).read_bytes().startswith(b"\x89PNG")
    events = json.loads((tmp_path / found["perfetto"]).read_text())["traceEvents"]
    names = {event["name"] for event in events}
    assert {"up", "down", "down dgrad", "wgrad", "pull"} <= names
    assert {(of["rank"], of["role"]) for of in found["waits"]} == {
        (rank, role) for rank in (0, 1) for role in ("comm", "compute")
    }
    status, printed, _ = cli(line)
    assert status == 0
    assert "hidden share:" in printed


def test_trace_of_both_modes(cli, tmp_path):
    line = "trace --device host --ranks 2 --scale 64 --tokens 16 --mode both --title two"
    status, printed, _ = cli(line + " --json")
    assert status == 0
    found = json.loads(printed)
    assert list(found["modes"]) == ["sequential", "fused"]
    assert found["modes"]["sequential"]["hidden_share"] == 0
    assert all(of["milliseconds"] > 0 and of["events"] > 10 for of in found["modes"].values())
    events = json.loads((tmp_path / found["perfetto"]).read_text())["traceEvents"]
    processes = {e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert processes == {f"{mode} rank {rank}" for mode in found["modes"] for rank in (0, 1)}
    status, printed, _ = cli(line)
    assert status == 0
    assert printed.count("hidden share:") == 2


def test_trace_without_matplotlib_still_writes_the_file(cli, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    status, printed, _ = cli("trace --device host --ranks 2 --scale 64 --tokens 16")
    assert status == 0
    assert "pip install 'cometrt[plot]'" in printed
    assert (tmp_path / "out" / "timeline.json").exists()


# ---- doctor --------------------------------------------------------------------------------------


def test_the_version_is_printed(cli):
    assert cli("--version")[:2] == (0, f"cometrt {cometrt.__version__}\n")


def test_a_probe_keeps_what_the_user_tells_mpi_but_not_what_a_launcher_does(monkeypatch):
    for name in ranks.RANKS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMPI_MCA_plm_rsh_agent", "sh")
    code = "import os; print(sorted(n for n in os.environ if n.startswith('OMPI_')))"
    allowed = ["OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"]
    kept = probes.run([sys.executable, "-c", code], 60)
    assert kept.strip() == str([*allowed, "OMPI_MCA_plm_rsh_agent"])
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    assert probes.run([sys.executable, "-c", code], 60).strip() == str(allowed)


def test_probes_see_the_environment_of_the_caller(cli, monkeypatch):
    """With many hardware queues the multi-process service refuses their processes."""
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    code = "import os; print(os.environ.get('CUDA_DEVICE_MAX_CONNECTIONS'))"

    def check(machine):
        said = probes.run([sys.executable, "-c", code], 60).strip()
        yield checks.Line("queues", "ok", said)

    monkeypatch.setattr(doctor, "CHECKS", {"queues": check})
    (line,) = json.loads(cli("doctor --json")[1])["checks"]
    assert line["text"] == "None"


def test_doctor_of_this_machine(cli):
    status, printed, said = cli("doctor --json")
    found = json.loads(printed)
    assert status == (1 if found["failed"] else 0)
    names = {line["check"] for line in found["checks"]}
    assert {"packages", "GPU", "cache", "/dev/shm", "MPI", "MPS", "peer access", "NCCL"} <= names
    for line in found["checks"]:
        assert line["state"] in ("ok", "note", "skipped", "failed")
        assert line["advice"] or line["state"] in ("ok", "skipped"), line
    assert "checking NCCL" in said


def states(check, machine=None):
    return {line.check: line for line in check(machine or checks.Machine())}


class Gpus(checks.Machine):
    """A machine with GPUs that a test makes up."""

    has_driver, cupy = True, "14.2"

    def __init__(self, count=2, capability=(9, 0), cuda=13000, peers=True):
        gpu = {"name": "A GPU", "capability": list(capability), "bytes": 80 << 30, "sms": 132}
        matrix = [[i == j or peers for j in range(count)] for i in range(count)]
        self.found = {"gpus": [gpu] * count, "cuda": cuda, "peers": matrix}


def test_lines_of_a_machine_without_a_gpu_say_so(no_gpu, monkeypatch):
    monkeypatch.setattr(checks.Machine, "has_driver", False)
    monkeypatch.setattr(checks.Machine, "found", {"gpus": []})
    for check in (
        checks.check_gpus, checks.check_multi_process_service, checks.check_peers,
        checks.check_nccl,
    ):  # fmt: skip
        (line,) = states(check).values()
        assert (line.state, line.text) == ("skipped", "no GPU: skipped")


@pytest.mark.parametrize(
    ("check", "machine", "name", "advice"),
    [
        (checks.check_gpus, Gpus(capability=(8, 0)), "GPU", "Hopper"),
        (checks.check_gpus, Gpus(cuda=12040), "driver", "580"),
        (checks.check_gpus, Gpus(count=0), "GPU", "nvidia-smi"),
        (checks.check_peers, Gpus(peers=False), "peer access", "GPUs that reach each other"),
    ],
)
def test_what_is_wrong_with_gpus_fails_and_says_what_to_do(check, machine, name, advice):
    line = states(check, machine)[name]
    assert line.state == "failed"
    assert advice in line.advice


@pytest.mark.parametrize(("visible", "runs"), [("1", True), ("1", False), ("", True)])
def test_gpus_that_the_service_numbers_anew(visible, runs, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(checks, "_runs", lambda program: runs)
    line = states(checks.check_gpus, Gpus(count=0))["GPU"]
    assert ("its daemon saw from 0" in line.advice) == (runs and visible == "1")


def test_good_gpus_pass():
    found = states(checks.check_gpus, Gpus()) | states(checks.check_peers, Gpus())
    assert {line.state for line in found.values()} == {"ok"}
    assert "2 x A GPU (80.00 GiB" in found["GPU"].text


def test_a_cache_that_cannot_be_written_fails(monkeypatch):
    monkeypatch.setenv("COMETRT_CACHE_DIR", "/dev/null/cache")
    line = states(checks.check_cache)["cache"]
    assert line.state == "failed"
    assert "COMETRT_CACHE_DIR" in line.advice


def test_ranks_that_do_not_see_each_other_fail(monkeypatch):
    monkeypatch.setattr(checks, "version_of", lambda *names: "1")
    monkeypatch.setattr(checks, "mpirun", lambda: "/bin/mpirun")
    alone = {"sizes": [1], "library": "An MPI"}
    monkeypatch.setattr(checks, "probe", lambda name, **more: alone)
    line = states(checks.check_mpi)["MPI"]
    assert line.state == "failed"
    assert "mpirun that belongs to" in line.advice


def test_ranks_that_share_no_memory_fail(monkeypatch):
    def probe(name, **more):
        if name == "ranks":
            raise probes.ProbeFailed("exit status 1: cuIpcOpenMemHandle failed")
        return {"sizes": [2, 2], "library": "An MPI"}

    monkeypatch.setattr(checks, "version_of", lambda *names: "1")
    monkeypatch.setattr(checks, "mpirun", lambda: "/bin/mpirun")
    monkeypatch.setattr(checks, "probe", probe)
    found = states(checks.check_mpi, Gpus(count=4))
    assert found["MPI"].state == "ok"
    assert found["IPC"].state == "failed"
    assert "4 ranks cannot share memory" in found["IPC"].text
    assert "--ipc=host" in found["IPC"].advice


def test_a_check_that_breaks_fails_and_others_go_on(monkeypatch):
    def broken(machine):
        raise RuntimeError("no way")
        yield

    monkeypatch.setattr(doctor, "CHECKS", {"one": broken, "cache": checks.check_cache})
    first, second = doctor.run_checks(lambda text: None)
    assert (first.check, first.state, first.text) == ("one", "failed", "RuntimeError: no way")
    assert second.check == "cache"


def test_a_probe_that_hangs_is_ended():
    child = """
import subprocess, sys
subprocess.run([sys.executable, "-c", "import time; time.sleep(60)"])
"""
    begin = time.monotonic()
    with pytest.raises(probes.ProbeFailed, match=r"did not end within 0\.5 s"):
        probes.run([sys.executable, "-c", child], 0.5)
    assert time.monotonic() - begin < 10


def test_a_probe_that_fails_says_why():
    with pytest.raises(probes.ProbeFailed, match="exit status 1: ValueError: this"):
        probes.run([sys.executable, "-c", "raise ValueError('this')"], 20)
    with pytest.raises(probes.ProbeFailed, match="no-such-program"):
        probes.run(["no-such-program"], 20)


def test_the_version_is_that_of_the_package(cli):
    assert f"cometrt {cometrt.__version__}" in states(checks.check_packages)["packages"].text


# ---- tables of what only a GPU measures --------------------------------------------------------


def test_bench_on_gpus_shows_rates_and_nccl(capsys):
    from rich.console import Console

    from cometrt.bench.records import spread
    from cometrt.cli import bench

    times = {
        name: {"isolated": spread([ms]), "sustained": 2 * ms}
        for name, ms in {"fused": 1.0, "sequential": 1.5, "nccl": 1.25, "gemms": 0.75}.items()
    }
    entry = {"flops": 6e11, "link_ms": 0.0, "times": times}
    found = {
        "model": "mixtral-8x7b", "scale": 1, "tokens": 8192, "ranks": 4, "tp": 1, "device": "cuda",
        "machine": {"gpu": "A GPU"}, "passes": {"forward": entry},
    }  # fmt: skip
    bench.show(Console(width=80), found)
    printed = capsys.readouterr().out
    fused = next(line for line in printed.splitlines() if line.split()[:1] == ["fused"])
    assert fused.split() == ["fused", "1.000", "1.000", "2.000", "600", "300"]
    assert "NCCL's form takes 1.25 times as long as fused" in printed
    del times["nccl"]
    bench.show(Console(width=80), found)
    assert "NCCL: not installed" in capsys.readouterr().out


def test_tune_shows_what_has_changed(capsys):
    from rich.console import Console

    from cometrt.cli import tune

    found = {
        "model": "qwen3-30b-a3b", "tokens": 8192, "ranks": 4, "tp": 1, "seconds": 12.0,
        "before": {"order": "phases", "num_phases": 2}, "file": "/cache/[x]/tuned.json",
        "trials": 87,
        "config": {"order": "columns", "num_phases": 2},
    }  # fmt: skip
    tune.show(Console(width=80), found)
    printed = capsys.readouterr().out
    assert "tuned in 12 s, 87 trials" in printed
    assert "columns" in printed
    assert "/cache/[x]/tuned.json" in printed


def test_tune_says_how_far_it_is(monkeypatch):
    from cometrt.cli import tune

    now, said = [5.0], []
    monkeypatch.setattr(tune.time, "monotonic", lambda: now[0])
    progress = tune.told("tuning a layer", said.append)
    progress(1, {"forward": 2.0})
    progress(2, {"forward": 1.5})
    now[0] += tune.SAY_SEC
    progress(3, {"forward": 1.5, "backward": 3.25})
    assert said == [
        "tuning a layer: 1 trials, fastest forward 2.000 ms",
        "tuning a layer: 3 trials, fastest forward 1.500 ms, backward 3.250 ms",
    ]


def test_tune_of_a_layer(monkeypatch):
    """`layer.tune` needs a GPU: here it is another function."""
    from cometrt.cli import tune

    config, asked, said = cometrt.TileConfig(num_phases=1), [], []

    def instead(self, *, training, budget_sec, progress):
        asked.append((training, budget_sec))
        if self.world.rank == 0:
            progress(7, {"forward": 1.0})
        return config

    monkeypatch.setattr(cometrt.MoELayer, "tune", instead)
    spec = scaled_spec("mixtral-8x7b", 64, max_tokens=8)
    monkeypatch.setattr(tune, "scaled_spec", lambda *_, **more: spec)

    def fn(world):
        say = said.append if world.rank == 0 else lambda text: None
        return tune.run(world, "mixtral-8x7b", 8, 1, False, 2.5, say)

    found, _ = cometrt.spawn(fn, 2)
    assert asked == [(False, 2.5)] * 2
    assert found["trials"] == 7
    assert found["config"] == dataclasses.asdict(config) != found["before"]
    assert said == ["tuning mixtral-8x7b, 8 tokens a rank: 7 trials, fastest forward 1.000 ms"]
