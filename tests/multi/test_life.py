"""How worlds begin and end under mpirun, and who launched them."""

import re
import subprocess
import sys

import pytest

import cometrt
from tests.launch import mpirun


def test_the_life_of_worlds():
    result = mpirun(3, "-m", "tests.multi.run_life", timeout_sec=120)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("all parts passed") == 3


ENDS = """
import time
from mpi4py import MPI
import cometrt
world, begin = cometrt.connect(MPI.COMM_WORLD, device="host", timeout_sec=40), time.monotonic()
if world.rank != 1:
    try:
        world.barrier()
    except cometrt.PeerTimeout as error:
        assert time.monotonic() - begin < 15
        print("told:", error, flush=True)
"""


def test_a_script_that_ends_without_closing_is_noticed_at_once(tmp_path):
    (tmp_path / "ends.py").write_text(ENDS)
    result = mpirun(3, str(tmp_path / "ends.py"), timeout_sec=60)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("rank 1 has left the world after 0 calls; ") == 2


EXITS = """
import sys
from mpi4py import MPI
import cometrt
try:
    with cometrt.connect(MPI.COMM_WORLD, device="host", timeout_sec=40) as world:
        if world.rank == 1:
            sys.exit(0)
        world.barrier()
except cometrt.PeerTimeout as error:
    print("told:", error, flush=True)
"""


def test_a_rank_that_exits_says_so(tmp_path):
    (tmp_path / "exits.py").write_text(EXITS)
    result = mpirun(3, str(tmp_path / "exits.py"), timeout_sec=60)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("rank 1 exited (SystemExit: 0)") == 2


@pytest.mark.parametrize(
    ("environment", "started"),
    [
        ({"OMPI_COMM_WORLD_SIZE": "4"}, 4),
        ({"PMI_SIZE": "3", "PMI_RANK": "2"}, 3),
        ({"MV2_COMM_WORLD_SIZE": "4"}, 4),
        ({"PALS_SIZE": "2"}, 2),
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2"}, 4),
        ({"WORLD_SIZE": "8", "RANK": "3", "LOCAL_WORLD_SIZE": "8"}, 8),
        ({"SLURM_STEP_NUM_TASKS": "1", "WORLD_SIZE": "8"}, 8),
        ({"SLURM_STEP_NUM_TASKS": "1", "WORLD_SIZE": "one"}, None),
        ({"PMI_SIZE": "1", "SLURM_STEP_NUM_TASKS": "4"}, None),  # mpirun -n 1 in a job of srun
        ({}, None),
    ],
)
def test_a_launcher_that_mpi_does_not_know_is_told(monkeypatch, environment, started):
    MPI = pytest.importorskip("mpi4py.MPI")
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if started is None:
        with cometrt.connect(MPI.COMM_SELF, device="host") as world:
            assert world.size == 1
        return
    rule = f"it started {started}, MPI.COMM_WORLD has 1; "
    with pytest.raises(ValueError, match=re.escape(rule)):
        cometrt.connect(MPI.COMM_WORLD, device="host")


NOT_INITIALISED = """
import mpi4py
mpi4py.rc.initialize = False
from mpi4py import MPI
import cometrt
try:
    cometrt.connect(MPI.COMM_WORLD, "host")
except ValueError as error:
    print(error)
"""


def test_mpi_must_run():
    pytest.importorskip("mpi4py.MPI")
    run = [sys.executable, "-c", NOT_INITIALISED]
    result = subprocess.run(run, capture_output=True, text=True, timeout=60)
    assert "(got one of an MPI that is not initialised)" in result.stdout, result.stderr
