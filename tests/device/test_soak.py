"""A few hundred calls of tests/device/soak.py, in a process that ends should one hang."""

import subprocess
import sys

import pytest

from tests.launch import ROOT

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("arguments", [("--ranks", "8"), ("--ranks", "3", "--link", "h100")])
def test_soak(arguments):
    command = [sys.executable, "tests/device/soak.py", "--calls", "300", "--seconds", "60"]
    result = subprocess.run(
        [*command, *arguments], capture_output=True, text=True, cwd=ROOT, timeout=280
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert "300 forwards and" in result.stdout
    assert ": 0 failures;" in result.stdout
