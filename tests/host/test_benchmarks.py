"""Benchmarks start: what they import from each other is there. CuPy is a stand-in."""

import subprocess
import sys

import pytest

from tests.launch import ROOT

SCRIPTS = ["engine.py", "host_time.py", "layer.py", "multi_gpu.py", "peers.py", "link/link.py"]
START = """
import runpy, sys
from unittest.mock import MagicMock
cupy = MagicMock()
cupy.cuda.runtime.getDeviceCount.return_value = 2
sys.modules |= {"cupy": cupy, "cupy.cuda": cupy.cuda, "cupy.cuda.nccl": cupy.cuda.nccl}
sys.argv = [sys.argv[1], "--help"]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_benchmark_says_how_to_use_it(script):
    command = [sys.executable, "-c", START, f"benchmarks/{script}"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert "usage:" in found.stdout
