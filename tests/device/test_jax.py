"""The layer inside JAX programs on GPUs; JAX must see them: pip install 'jax[cuda13]'."""

import json
import os
import re
import subprocess
import sys

import pytest

from benchmarks.stacks import figures
from tests.host.test_jax import run_processes
from tests.launch import ROOT, mpirun, python_path

pytestmark = pytest.mark.gpu

CODE = """
import jax
assert jax.default_backend() == "gpu", jax.default_backend()
"""


@pytest.fixture(scope="module")
def num_gpus():
    """GPUs of this host, seen by CuPy; JAX gets a process of its own, which takes the memory."""
    cupy = pytest.importorskip("cupy")
    result = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    if result.returncode:
        pytest.skip(f"needs a JAX that sees the GPU: {result.stderr[-300:]}")
    return cupy.cuda.runtime.getDeviceCount()


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Ranks may share a GPU, whose memory JAX must not take at once."""
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    monkeypatch.setenv("OMPI_ALLOW_RUN_AS_ROOT", "1")
    monkeypatch.setenv("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")
    monkeypatch.setenv("PYTHONPATH", python_path())
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)


def run(*arguments, timeout_sec=280):
    result = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=timeout_sec, cwd=ROOT
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_one_process_alone(num_gpus):
    assert "on cuda: all is well" in run("-m", "tests.multi.run_jax_gpu")


def test_jit_in_each_process_under_mpirun(num_gpus):
    """Bits of the CuPy calls; errors; two ranks, on two GPUs or on one."""
    arguments = ["-m", "mpi4py", "-m", "tests.multi.run_jax", "--gpus", str(num_gpus)]
    result = mpirun(2, *arguments, timeout_sec=280)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("on cuda: all is well") == 2, result.stdout + result.stderr


def test_many_steps_with_all_reduces_without_mpi(num_gpus):
    count = min(num_gpus, 4)
    if count < 2:
        pytest.skip("needs two GPUs: NCCL refuses two ranks on one")
    steps = os.environ.get("COMETRT_JAX_STEPS", "200")
    arguments = ["--processes", str(count), "--gpus", "--steps", steps]
    program = "tests.multi.run_jax_distributed"
    for output in run_processes(count, "-m", program, *arguments, timeout_sec=280):
        assert "on cuda: all is well" in output


def test_example(num_gpus):
    output = run(str(ROOT / "examples/jax_moe.py"))
    losses = [float(line.split("loss ")[1]) for line in output.splitlines() if "loss " in line]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(("data", "fault"), [(1, "stall"), (2, "routing")])
def test_language_model(num_gpus, data, fault, tmp_path):
    """One group of all ranks, and two groups. A step fails and is done again."""
    pytest.importorskip("optax")
    pytest.importorskip("safetensors")
    if num_gpus < 2:
        pytest.skip("needs two GPUs")
    options = ["--data", str(data), "--fault", fault, "--timeout", "20", "--out", str(tmp_path)]
    command = ["-m", "mpi4py", "examples/train_lm.py", "--tiny", "--steps", "60", *options]
    result = mpirun(2 * min(num_gpus // 2, 2), *command, timeout_sec=280)
    assert result.returncode == 0, result.stdout + result.stderr
    error = {"stall": "PeerTimeout", "routing": "RoutingError"}[fault]
    assert f"back to step 0 ({error}" in result.stdout
    losses = re.findall(r"loss (\S+) nats/byte", result.stdout)
    assert float(losses[-1]) < 3.5


def test_a_step_beside_the_calls(num_gpus, tmp_path):
    """The benchmark itself, with a tiny layer: the same bits, and all its figures."""
    out, ranks = tmp_path / "step.json", "1,2" if num_gpus > 1 else "1"
    small = "--model tiny --tokens 64 --rounds 3 --steps 4 --layers 2 --device cuda"
    run("-m", "benchmarks.jax_step", *small.split(), "--ranks", ranks, "--out", str(out))
    cells = json.loads(out.read_text())["cells"]
    assert len(cells) == len(ranks.split(","))
    for entry in cells.values():
        for side in entry["times"].values():
            assert side["us"]["median"] > side["watched"]["forward us"] > 0
            assert side["watched"]["graphs made"] >= 0


def test_transformer_layers_end_to_end(num_gpus, tmp_path):
    """The benchmark itself, with JAX's own MoE layer: losses agree within noise."""
    if num_gpus < 2:
        pytest.skip("needs two GPUs")
    out, ranks = tmp_path / "end_to_end.json", str(min(num_gpus, 4))
    small = "--models tiny --sequence 64 --steps 10 --rounds 3 --sustain-sec 0.2 --device cuda"
    contenders = ["fused", "sequential", "jax batched"]
    command = ["-m", "benchmarks.end_to_end", *small.split(), "--ranks", ranks]
    run(*command, "--contenders", ",".join(contenders), "--out", str(out))
    (entry,) = json.loads(out.read_text())["cells"].values()
    for contender in contenders:
        assert figures(entry, contender)["loss_gap"] < 1e-2
