"""The layer inside JAX programs on one GPU; JAX must see it: pip install 'jax[cuda13]'."""

import pytest

from tests.launch import ROOT, run_python

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("jax_gpus")]


def test_one_process_alone():
    assert "on cuda: all is well" in run_python("-m", "tests.multi.run_jax_gpu")


def test_example():
    output = run_python(str(ROOT / "examples/jax_moe.py"))
    losses = [float(line.split("loss ")[1]) for line in output.splitlines() if "loss " in line]
    assert losses[-1] < 0.5 * losses[0]
