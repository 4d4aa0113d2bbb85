"""Four GPUs as two nodes of two ranks: NCCL over NVLink, and over loopback sockets."""

import pytest

from tests.device.test_peers import num_gpus
from tests.launch import mpirun

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(num_gpus() < 4, reason="needs four GPUs")]

# As between hosts without RDMA: NCCL has neither peer access nor shared memory.
SOCKETS = {
    "NCCL_P2P_DISABLE": "1",
    "NCCL_SHM_DISABLE": "1",
    "NCCL_IB_DISABLE": "1",
    "NCCL_SOCKET_IFNAME": "lo",
}


@pytest.fixture(params=["nvlink", "sockets"])
def nodes(monkeypatch, request):
    monkeypatch.setenv("COMETRT_RANKS_PER_NODE", "2")
    # Many hardware queues are for ranks that share a process.
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    for name, value in SOCKETS.items() if request.param == "sockets" else ():
        monkeypatch.setenv(name, value)


def test_calls_failures_and_resets(nodes):
    result = mpirun(4, "-m", "tests.multi.run_cuda_nodes", timeout_sec=290)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
    assert result.stdout.count("all parts passed") == 4


def test_soak(nodes):
    result = mpirun(4, "-m", "tests.multi.run_cuda_nodes", "--soak", "2000", timeout_sec=290)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
    assert result.stdout.count("all parts passed") == 4
