"""No kernel reads or writes outside its memory."""

import shutil
import subprocess
import sys

import pytest

from tests.launch import ROOT

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("ranks", [1, 4])
def test_memcheck_is_clean(ranks):
    program = shutil.which("compute-sanitizer")
    if program is None:
        pytest.skip("needs compute-sanitizer")
    command = [program, "--tool", "memcheck", "--error-exitcode", "3"]
    command += ["--report-api-errors", "no"]  # cuda-bindings asks for functions that are not there
    result = subprocess.run(
        [*command, sys.executable, "-m", "tests.device.sanitize", str(ranks)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=200,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert "cases passed" in result.stdout
    assert "ERROR SUMMARY: 0 errors" in result.stdout + result.stderr
