"""The commands of `cometrt` on the GPUs of this host: exit status, JSON, and what the JSON says."""

import dataclasses
import functools
import importlib.util
import json
import subprocess
import sys
import time

import pytest

import cometrt
from cometrt.bench.workloads import tolerance
from cometrt.cli.ranks import HOST_RANKS
from cometrt.kernels.compiler import cache_folder, replace_files
from cometrt.legality import check_layer
from cometrt.models import scaled_spec
from tests.gpu import visible_gpus
from tests.launch import environment

pytestmark = pytest.mark.gpu
pytest.importorskip("typer", reason="needs the cli extra")
from cometrt.cli import probes  # noqa: E402

PASSES = ["forward", "backward", "both"]
SMALL = ["--scale", "16", "--tokens", "64"]


@functools.cache
def gpus():
    return len(visible_gpus())


def ranks():
    """As many as a command takes by itself."""
    return gpus() if gpus() > 1 else HOST_RANKS


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A folder with the kernels of the user's cache. What is tuned here stays out of that one; what
    is compiled here goes there."""
    folder, users = tmp_path_factory.mktemp("cache"), cache_folder()
    for path in users.glob("*.*"):
        if path.suffix in (".cubin", ".txt"):
            (folder / path.name).symlink_to(path.resolve())
    yield folder
    new = [p for p in folder.iterdir() if p.suffix in (".cubin", ".txt") and not p.is_symlink()]
    replace_files(users, {path.name: path.read_bytes() for path in new})


@pytest.fixture
def cli(cache, tmp_path):
    """cli(words...) -> (exit status, the JSON on stdout, stderr), in a folder of its own."""

    def call(*words, timeout_sec=120):
        result = subprocess.run(
            [sys.executable, "-m", "cometrt", *words, "--json"], capture_output=True, text=True,
            timeout=timeout_sec, cwd=tmp_path,
            env=environment() | {"COMETRT_CACHE_DIR": str(cache)},
        )  # fmt: skip
        assert result.stdout, result.stderr
        return result.returncode, json.loads(result.stdout), result.stderr

    return call


def test_doctor(cli):
    """What fails says what to do. The GPUs, their driver and the compiler are well: others of these
    tests use them."""
    status, found, said = cli("doctor", timeout_sec=280)
    failed = [line for line in found["checks"] if line["state"] == "failed"]
    assert (status, found["failed"]) == (bool(failed), len(failed))
    assert all(line["advice"] for line in failed), failed
    lines = {line["check"]: line for line in found["checks"]}
    for check in ("packages", "GPU", "driver", "NVRTC", "cache", "MPS"):
        assert lines[check]["state"] in ("ok", "note"), lines[check]
    assert f"{gpus()} x " in lines["GPU"]["text"]
    assert lines["peer access"]["state"] == ("skipped" if gpus() == 1 else "ok")
    assert "checking NCCL" in said


def test_demo(cli, tmp_path):
    status, found, _ = cli("demo", *SMALL, "--out", "there")
    assert status == 0
    assert (found["device"], found["mode"], len(found["ranks"])) == ("cuda", "fused", ranks())
    spec = scaled_spec("qwen3-30b-a3b", 16, max_tokens=64)
    assert all(0 < of["error"] < tolerance(spec.dtype) for of in found["ranks"])
    assert sum(of["rows"] for of in found["ranks"]) == ranks() * 64 * spec.topk
    check_files(found, tmp_path)


def test_bench(cli):
    line = ["bench", "--tokens", "256", "--rounds", "3", "--seconds", "0.05"]
    status, found, said = cli(*line)
    assert status == 0
    assert (found["device"], found["ranks"], found["tokens"]) == ("cuda", ranks(), 256)
    assert list(found["passes"]) == PASSES
    for which, entry in found["passes"].items():
        assert f"measuring {which}" in said
        assert entry["sms"] > 0
        assert {"fused", "sequential"} <= set(entry["error"])
        assert all(0 <= error < tolerance("bfloat16") for error in entry["error"].values())
        times = entry["times"]
        assert {"fused", "sequential", "gemms"} <= set(times)
        for name, of in times.items():
            assert 0 < of["isolated"]["median"] < 1e3, name
            assert 0 < of["sustained"] < 1e3, name
    has_nccl = "nccl" in found["passes"]["forward"]["times"]
    assert has_nccl == (gpus() > 1 and probes.nccl()["version"] > 0)


def test_tune(cli, cache):
    begin = time.monotonic()
    status, found, said = cli("tune", "--tokens", "256", "--budget-sec", "8")
    assert status == 0
    assert 0 < found["seconds"] < min(60, time.monotonic() - begin)
    config = cometrt.TileConfig(**found["config"])
    check_layer(scaled_spec("qwen3-30b-a3b", max_tokens=256), ranks(), "cuda", "fused", config)
    assert found["trials"] >= 2
    assert "trials, fastest forward" in said
    (entry,) = json.loads((cache / "tuned.json").read_text())["entries"].values()
    assert entry["config"] == dataclasses.asdict(config)
    assert set(entry["ms"]) == {"forward", "backward"}
    assert found["file"] == str(cache / "tuned.json")


def test_trace(cli, tmp_path):
    status, found, _ = cli("trace", *SMALL, "--out", "there")
    assert status == 0
    assert (found["device"], found["mode"], found["ranks"]) == ("cuda", "fused", ranks())
    assert 0 < found["milliseconds"] < 1e4
    assert {of["rank"] for of in found["waits"]} == set(range(ranks()))
    check_files(found, tmp_path)


def check_files(found, folder):
    """Both passes of all ranks are in the file for Perfetto, and there is a picture."""
    events = json.loads((folder / found["perfetto"]).read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    assert len(spans) == found["events"]
    for rank in range(ranks()):
        names = {event["name"] for event in spans if event["pid"] == rank}
        assert {"up", "down", "down dgrad", "up dgrad", "wgrad", "pull"} <= names, rank
    if importlib.util.find_spec("matplotlib"):
        assert (folder / found["picture"]).read_bytes().startswith(b"\x89PNG")
    else:
        assert "cometrt[plot]" in found["no_picture"]


def test_memory(cli):
    status, found, _ = cli("memory", "--ranks", "4", "--tokens", "512")
    assert status == 0
    memory = scaled_spec("qwen3-30b-a3b", max_tokens=512).memory(4)
    assert found["bytes"]["512"]["heap"] == memory.heap
    assert found["bytes"]["512"]["weights"] == memory.weights
