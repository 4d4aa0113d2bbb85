"""The layer inside JAX programs on up to four GPUs, a process for each."""

import os
import re

import pytest

from tests.host.test_jax import run_processes
from tests.launch import mpirun

pytestmark = pytest.mark.gpu


def test_many_steps_with_all_reduces_without_mpi(two_jax_gpus):
    """NCCL refuses two ranks on one GPU."""
    count = min(two_jax_gpus, 4)
    steps = os.environ.get("COMETRT_JAX_STEPS", "200")
    arguments = ["--processes", str(count), "--gpus", "--steps", steps]
    program = "tests.multi.run_jax_distributed"
    for output in run_processes(count, "-m", program, *arguments, timeout_sec=280):
        assert "on cuda: all is well" in output


@pytest.mark.parametrize(("data", "fault"), [(1, "stall"), (2, "routing")])
def test_language_model(two_jax_gpus, data, fault, tmp_path):
    """One group of all ranks, and two groups. A step fails and is done again."""
    pytest.importorskip("optax")
    pytest.importorskip("safetensors")
    options = ["--data", str(data), "--fault", fault, "--timeout", "10", "--out", str(tmp_path)]
    command = ["-m", "mpi4py", "examples/train_lm.py", "--tiny", "--steps", "60", *options]
    result = mpirun(2 * min(two_jax_gpus // 2, 2), *command, timeout_sec=280)
    assert result.returncode == 0, result.stdout + result.stderr
    error = {"stall": "PeerTimeout", "routing": "RoutingError"}[fault]
    assert f"back to step 0 ({error}" in result.stdout
    losses = re.findall(r"loss (\S+) nats/byte", result.stdout)
    assert float(losses[-1]) < 3.5
