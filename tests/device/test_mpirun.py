"""Ranks as processes that share one GPU over CUDA IPC, with and without the multi-process
service."""

import contextlib
import re
import subprocess

import pytest

from cometrt.models import MODELS
from tests.launch import mpirun
from tests.service import multi_process_service

pytestmark = pytest.mark.gpu


@pytest.fixture
def service(tmp_path, monkeypatch, request):
    """The multi-process service in a folder of its own, where the parameter says so."""
    monkeypatch.setenv("OMPI_ALLOW_RUN_AS_ROOT", "1")
    monkeypatch.setenv("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")
    # `spawn` wants many hardware queues; clients of the service are refused with them.
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    if not request.param:
        yield
        return
    with contextlib.ExitStack() as stack:
        try:
            variables = stack.enter_context(multi_process_service(tmp_path))
        except (FileNotFoundError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no multi-process service here: {error}")
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        yield


@pytest.mark.parametrize("service", [False, True], ids=["time-sliced", "service"], indirect=True)
def test_cases_under_mpirun(service):
    result = mpirun(4, "-m", "tests.multi.run_cuda_cases", timeout_sec=150)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
    assert "all cases passed" in result.stdout


@pytest.mark.parametrize("service", [False, True], ids=["time-sliced", "service"], indirect=True)
def test_scaled_models_under_mpirun(service):
    options = ["--scale", "32", "--tokens", "96", "--device", "cuda"]
    result = mpirun(4, "-m", "tests.multi.run_models", *options, timeout_sec=250)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("checked: y ") == len(MODELS)


@pytest.mark.parametrize("service", [True], ids=["service"], indirect=True)
def test_examples_use_the_gpu(service, tmp_path):
    result = mpirun(4, "-m", "mpi4py", "examples/demo.py", "--scale", "16", "--out", str(tmp_path))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "4 ranks on cuda, mode fused" in result.stdout
    assert "every result agrees with the float64 reference" in result.stdout
    result = mpirun(4, "-m", "mpi4py", "examples/moe_layer.py", "--scale", "32", "--tp", "2")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "checked: y " in result.stdout


@pytest.mark.parametrize("service", [False, True], ids=["time-sliced", "service"], indirect=True)
def test_the_training_step_of_cupy_on_the_gpu(service):
    script = ["-m", "mpi4py", "examples/cupy_moe.py", "--device", "cuda"]
    result = mpirun(4, *script, timeout_sec=150)
    assert result.returncode == 0, result.stdout + result.stderr
    losses = [float(value) for value in re.findall(r"loss (\S+), balance", result.stdout)]
    assert len(losses) == 5
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize("service", [False, True], ids=["time-sliced", "service"], indirect=True)
def test_two_groups_of_two_ranks_on_the_gpu(service):
    """On four GPUs gradients are summed by NCCL."""
    script = ["-m", "mpi4py", "examples/two_groups.py", "--device", "cuda"]
    result = mpirun(4, *script, timeout_sec=150)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "2 x 2 ranks on cuda: errors of at most " in result.stdout  # else it raises
    losses = [float(value) for value in re.findall(r"loss (\S+)", result.stdout)]
    assert len(losses) == 5
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize("service", [False, True], ids=["time-sliced", "service"], indirect=True)
@pytest.mark.parametrize("ranks", [1, 4])
def test_the_serving_loop_replays_a_graph(service, ranks):
    script = ["-m", "mpi4py", "examples/serve.py", "--batches", "50", "--device", "cuda"]
    result = mpirun(ranks, *script, timeout_sec=150)
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(rf"^{ranks} ranks on cuda: \d+ tokens/s, ", result.stdout, re.MULTILINE)


@pytest.mark.parametrize("ranks", [1, 4])
def test_a_model_trains_on_the_gpu(ranks):
    script = ["-m", "mpi4py", "examples/train_bytes.py", "--device", "cuda"]
    result = mpirun(ranks, *script, timeout_sec=150)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "step   59  loss" in result.stdout
