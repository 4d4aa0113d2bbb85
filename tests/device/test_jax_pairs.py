"""The layer inside JAX programs on two GPUs, a process for each."""

import json

import pytest

from benchmarks.stacks import figures
from tests.launch import mpirun, run_python

pytestmark = pytest.mark.gpu


def test_jit_in_each_process_under_mpirun(jax_gpus):
    """Bits of the CuPy calls; errors; two ranks, on two GPUs or on one."""
    arguments = ["-m", "mpi4py", "-m", "tests.multi.run_jax", "--gpus", str(jax_gpus)]
    result = mpirun(2, *arguments, timeout_sec=280)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("on cuda: all is well") == 2, result.stdout + result.stderr


def test_a_step_beside_the_calls(jax_gpus, tmp_path):
    """The benchmark itself, with a tiny layer: the same bits, and all its figures."""
    out, ranks = tmp_path / "step.json", "1,2" if jax_gpus > 1 else "1"
    small = "--model tiny --tokens 64 --rounds 3 --steps 4 --layers 2 --device cuda"
    run_python("-m", "benchmarks.jax_step", *small.split(), "--ranks", ranks, "--out", str(out))
    cells = json.loads(out.read_text())["cells"]
    assert len(cells) == len(ranks.split(","))
    for entry in cells.values():
        for side in entry["times"].values():
            assert side["us"]["median"] > side["watched"]["forward us"] > 0
            assert side["watched"]["graphs made"] >= 0


@pytest.mark.usefixtures("two_jax_gpus")
def test_transformer_layers_end_to_end(tmp_path):
    """The benchmark itself, with JAX's own MoE layer: losses agree within noise."""
    out = tmp_path / "end_to_end.json"
    small = "--models tiny --sequence 64 --steps 10 --rounds 3 --sustain-sec 0.2 --device cuda"
    contenders = ["fused", "sequential", "jax batched"]
    command = ["-m", "benchmarks.end_to_end", *small.split(), "--ranks", "2"]
    run_python(*command, "--contenders", ",".join(contenders), "--out", str(out))
    (entry,) = json.loads(out.read_text())["cells"].values()
    for contender in contenders:
        assert figures(entry, contender)["loss_gap"] < 1e-2
