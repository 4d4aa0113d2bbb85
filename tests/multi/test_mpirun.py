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
import time
from mpi4py import MPI
import cometrt
if MPI.COMM_WORLD.Get_rank() == 0:
    try:
        cometrt.connect(MPI.COMM_WORLD, device="host", timeout_sec=0.5)
    except cometrt.PeerTimeout as error:
        print("caught:", error, flush=True)
        time.sleep(1)  # else mpirun may lose the line
        MPI.COMM_WORLD.Abort(3)
else:
    time.sleep(60)
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


LATE = """
import time
from mpi4py import MPI
import cometrt
rank = MPI.COMM_WORLD.Get_rank()
time.sleep(1.5 * rank)
begin = time.monotonic()
try:
    cometrt.connect(MPI.COMM_WORLD, device="host", timeout_sec=0.5)
except cometrt.PeerTimeout:
    print(f"rank {rank} gave up after {time.monotonic() - begin:.0f} s", flush=True)
time.sleep(2)
MPI.COMM_WORLD.Abort(3)
"""


def test_a_rank_that_connects_too_late_has_a_deadline_too(tmp_path):
    (tmp_path / "late.py").write_text(LATE)
    result = mpirun(2, str(tmp_path / "late.py"), timeout_sec=50)
    assert "rank 0 gave up" in result.stdout, result.stderr
    assert "rank 1 gave up" in result.stdout, result.stderr


LEAVES = """
import time
from mpi4py import MPI
import cometrt
rank, begin = MPI.COMM_WORLD.Get_rank(), time.monotonic()
try:
    with cometrt.connect(MPI.COMM_WORLD, device="host", timeout_sec=40) as world:
        if rank == 1:
            time.sleep(0.5)
            raise LookupError("mine")
except cometrt.PeerTimeout as error:
    assert time.monotonic() - begin < 15
    print("told:", error, flush=True)
except LookupError:
    pass
"""


def test_closing_with_a_rank_that_left_by_an_exception_tells_why_at_once(tmp_path):
    (tmp_path / "leaves.py").write_text(LEAVES)
    result = mpirun(3, str(tmp_path / "leaves.py"), timeout_sec=60)
    told = "rank 1 left without closing: rank 1 raised LookupError: mine"
    assert result.stdout.count(told) == 2, result.stdout + result.stderr


def test_an_exception_in_a_script_ends_all_ranks(tmp_path):
    (tmp_path / "raises.py").write_text(RAISES)
    result = mpirun(3, str(tmp_path / "raises.py"), timeout_sec=30)
    assert result.returncode != 0
    assert "LookupError: mine" in result.stderr
    assert "PeerTimeout: rank 1 raised LookupError: mine" in result.stderr
