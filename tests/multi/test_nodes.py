"""Layers over several nodes under mpirun: one host, cut into nodes of two ranks."""

import re

import pytest

from cometrt.world.nodes import ranks_per_node
from tests.launch import mpirun


def more(*case):
    """A case for --full."""
    return pytest.param(*case, marks=pytest.mark.full)


@pytest.fixture
def run_on(monkeypatch):
    def run(script: str, nodes: int, ranks_per_node: int, slices: int, late: int) -> None:
        monkeypatch.setenv("COMETRT_RANKS_PER_NODE", str(ranks_per_node))
        monkeypatch.setenv("NCCL_CGA_CLUSTER_SIZE", "1")
        ranks = nodes * ranks_per_node
        result = mpirun(ranks, "-m", script, str(slices), str(late))
        assert result.returncode == 0, result.stdout + result.stderr
        assert result.stdout.count("all parts passed") == ranks

    return run


@pytest.mark.parametrize(
    ("nodes", "ranks_per_node", "slices", "late"),
    [(2, 2, 1, 0), (3, 2, 1, 0), (3, 2, 3, 0), (2, 2, 1, 2), more(2, 2, 4, 0), more(3, 2, 1, 2)],
)
def test_calls_failures_and_resets_of_several_nodes(run_on, nodes, ranks_per_node, slices, late):
    run_on("tests.multi.run_nodes", nodes, ranks_per_node, slices, late)


@pytest.mark.parametrize(
    ("nodes", "ranks_per_node", "slices", "late"),
    [
        *((2, 2, 1, 0), (2, 2, 4, 0), (3, 2, 3, 0), (2, 1, 3, 0), (2, 2, 1, 1), (3, 2, 1, 2)),
        *(more(*case) for case in ((3, 2, 1, 0), (3, 2, 5, 0), (2, 2, 1, 2))),
    ],
)
def test_the_hosts_part_of_calls_on_cuda(run_on, nodes, ranks_per_node, slices, late):
    pytest.importorskip("cuda.bindings", reason="needs the compile extra")
    run_on("tests.multi.run_nodes_stand_in", nodes, ranks_per_node, slices, late)


@pytest.mark.parametrize(
    ("firsts", "cut", "expected"),
    [
        ([0, 0, 0, 0], "", 4),
        ([0, 0, 2, 2], "", 2),
        ([0, 0, 2, 2], "2", 2),
        ([0, 0, 0, 0], "1", 1),
        ([0, 0, 2, 2], "3", "COMETRT_RANKS_PER_NODE must divide the 2 ranks of a host (got '3')"),
        ([0, 0, 0, 0], "-2", "COMETRT_RANKS_PER_NODE must divide the 4 ranks of a host (got '-2')"),
        ([0, 0, 0, 0], "0", "COMETRT_RANKS_PER_NODE must divide the 4 ranks of a host (got '0')"),
        ([0, 0, 0, 3], "", "comm must have equally many ranks on each host (got [3, 1])"),
        ([0, 1, 0, 1], "", "comm must number the ranks of a host one after the other (got [0, 2] "),
    ],
)
def test_what_nodes_are_made_of(firsts, cut, expected):
    if isinstance(expected, int):
        assert ranks_per_node(firsts, [cut] * 4) == expected
        return
    with pytest.raises(ValueError, match=re.escape(expected)):
        ranks_per_node(firsts, [cut] * 4)


CUT = """
import os
from mpi4py import MPI
import cometrt
rank, found = MPI.COMM_WORLD.Get_rank(), []
for cut in "2", "4", "1", "3", "uneven":
    os.environ["COMETRT_RANKS_PER_NODE"] = str(1 + rank % 2) if cut == "uneven" else cut
    try:
        with cometrt.connect(MPI.COMM_WORLD, device="host", timeout_sec=20) as world:
            found.append(f"{world.rank}: {world.nodes} x {world.ranks_per_node}")
    except ValueError as error:
        found.append(f"{rank}: {error}")
found = MPI.COMM_WORLD.gather(found)
if rank == 0:
    print(*sum(found, []), sep="\\n", flush=True)
"""


def test_a_host_is_cut_into_nodes(tmp_path):
    (tmp_path / "cut.py").write_text(CUT)
    result = mpirun(4, str(tmp_path / "cut.py"), timeout_sec=60)
    assert result.returncode == 0, result.stderr
    expected = (
        "2 x 2",
        "1 x 4",
        "4 x 1",
        "COMETRT_RANKS_PER_NODE must divide the 4 ranks of a host (got '3')",
        "COMETRT_RANKS_PER_NODE must be equal on all ranks (got ['1', '2'])",
    )
    lines = [f"{rank}: {text}" for rank in range(4) for text in expected]
    assert result.stdout.splitlines() == lines


ENDS = """
import time
from mpi4py import MPI
import cometrt
world, begin = cometrt.connect(MPI.COMM_WORLD, device="host", timeout_sec=40), time.monotonic()
error = ""
if world.rank != 3:
    try:
        world.barrier()
    except cometrt.PeerTimeout as found:
        assert time.monotonic() - begin < 15
        error = str(found)
    others = MPI.COMM_WORLD.Create_group(MPI.COMM_WORLD.Get_group().Excl([3]))
    errors = others.gather(error)
    if world.rank == 0:
        print(*errors, sep="\\n", flush=True)
"""


def test_a_script_that_ends_without_closing_is_noticed_on_other_nodes(tmp_path, monkeypatch):
    monkeypatch.setenv("COMETRT_RANKS_PER_NODE", "2")
    (tmp_path / "ends.py").write_text(ENDS)
    result = mpirun(4, str(tmp_path / "ends.py"), timeout_sec=60)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("rank 3 has left the world after 0 calls; ") == 3
