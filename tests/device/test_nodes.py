"""GPUs of one host as two nodes: NCCL over NVLink, and over loopback sockets.

Four GPUs are two nodes of two ranks, two are nodes of one rank.
"""

import pytest

from tests.device.test_peers import num_gpus
from tests.launch import mpirun

RANKS = 4 if num_gpus() >= 4 else 2
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(num_gpus() < 2, reason="needs two GPUs")]

# As between hosts without RDMA: NCCL has neither peer access nor shared memory.
SOCKETS = {
    "NCCL_P2P_DISABLE": "1",
    "NCCL_SHM_DISABLE": "1",
    "NCCL_IB_DISABLE": "1",
    "NCCL_SOCKET_IFNAME": "lo",
}


@pytest.fixture(params=["nvlink", "sockets"])
def nodes(monkeypatch, request):
    monkeypatch.setenv("COMETRT_RANKS_PER_NODE", str(RANKS // 2))
    monkeypatch.setenv("NCCL_MAX_CTAS", "4")
    # Many hardware queues are for ranks that share a process.
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    for name, value in SOCKETS.items() if request.param == "sockets" else ():
        monkeypatch.setenv(name, value)


def run(*arguments: str) -> None:
    result = mpirun(RANKS, "-m", "tests.multi.run_cuda_nodes", *arguments, timeout_sec=290)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
    assert result.stdout.count("all parts passed") == RANKS


@pytest.mark.parametrize("slices", ["1", "3", "4"])
def test_calls_failures_and_resets(nodes, slices):
    run("--slices", slices)


@pytest.mark.parametrize("slices", ["1", "4"])
def test_tune(nodes, slices):
    run("--slices", slices, "--tune")


@pytest.mark.parametrize("slices", ["1", "4"])
def test_soak(nodes, slices):
    run("--slices", slices, "--soak", "2000")
