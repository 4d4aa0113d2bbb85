"""No kernel reads or writes outside its memory, or races on shared memory."""

import shutil
import subprocess
import sys

import pytest

from tests.launch import ROOT

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    ("tool", "what"),
    [
        ("memcheck", "1"),
        ("memcheck", "4"),
        ("memcheck", "engine"),
        ("racecheck", "engine"),
        ("memcheck", "router"),
        ("racecheck", "router"),
    ],
)
def test_sanitizer_is_clean(tool, what):
    program = shutil.which("compute-sanitizer")
    if program is None:
        pytest.skip("needs compute-sanitizer")
    command = [program, "--tool", tool, "--error-exitcode", "3"]
    command += ["--report-api-errors", "no"]  # cuda-bindings asks for functions that are not there
    result = subprocess.run(
        [*command, sys.executable, "-m", "tests.device.sanitize", what],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=200,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert "cases passed" in result.stdout
    clean = {"memcheck": "ERROR SUMMARY: 0 errors", "racecheck": "RACECHECK SUMMARY: 0 hazards"}
    assert clean[tool] in result.stdout + result.stderr
