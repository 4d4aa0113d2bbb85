"""The same layer under mpirun: many cases in one launch, the bits those of `spawn`."""

import json

from tests.cases import spawn_case
from tests.launch import mpirun


def test_cases_orders_and_failures_in_one_launch(tmp_path):
    from tests.multi.run_cases import CASES, SIZE

    result = mpirun(SIZE, "-m", "tests.multi.run_cases", str(tmp_path / "results.json"))
    assert result.returncode == 0, result.stdout + result.stderr
    digests = json.loads((tmp_path / "results.json").read_text())["digests"]
    assert len(digests) == len(CASES)
    for case in CASES:
        expected = [output.digest() for output in spawn_case(case, repeats=1)]
        assert digests[str(case)] == expected, f"mpirun and spawn give other bits in {case}"


ABSENT = """
import sys
from mpi4py import MPI
import cometrt
if MPI.COMM_WORLD.Get_rank() == 0:
    try:
        cometrt.connect(MPI.COMM_WORLD, device="host", timeout_sec=0.5)
    except cometrt.PeerTimeout as error:
        print("caught:", error, flush=True)
        MPI.COMM_WORLD.Abort(3)
else:
    import time; time.sleep(60)
"""


def test_connect_has_a_deadline(tmp_path):
    (tmp_path / "absent.py").write_text(ABSENT)
    result = mpirun(2, str(tmp_path / "absent.py"), timeout_sec=50)
    assert "caught: rank 0 waited 0.5 s in connect" in result.stdout, result.stderr


RAISES = """
from mpi4py import MPI
import cometrt
with cometrt.connect(MPI.COMM_WORLD, device="host", timeout_sec=50) as world:
    if world.rank == 1:
        raise LookupError("mine")
    world.barrier()
"""


def test_an_exception_in_a_script_ends_all_ranks(tmp_path):
    (tmp_path / "raises.py").write_text(RAISES)
    result = mpirun(3, str(tmp_path / "raises.py"), timeout_sec=30)
    assert result.returncode != 0
    assert "LookupError: mine" in result.stderr
    assert "PeerTimeout: rank 1 raised LookupError: mine" in result.stderr
