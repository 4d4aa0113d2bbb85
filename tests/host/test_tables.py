"""The README quotes what the benchmarks wrote."""

import subprocess
import sys

from tests.launch import ROOT


def test_the_readme_has_the_tables_of_the_results():
    command = [sys.executable, "benchmarks/tables.py", "--check"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
