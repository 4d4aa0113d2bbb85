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


PROGRAMS = [  # each begins with a start of all ranks, which takes some seconds
    ("nvlink", 1, "calls --tune --soak 300"),
    ("nvlink", 1, "calls deadlines --soak 300 --late 2"),
    ("nvlink", 3, "calls"),
    ("nvlink", 4, "calls deadlines --soak 300"),
    ("sockets", 1, "calls deadlines --soak 100"),
    ("sockets", 4, "calls --tune --soak 100"),
    ("sockets", 1, "calls --soak 100 --late 1"),
]
MORE = [
    ("nvlink", 1, "deadlines --soak 2000"),
    ("nvlink", 3, "deadlines"),
    ("nvlink", 4, "--tune --soak 2000"),
    ("nvlink", 1, "--soak 2000 --late 2"),
    ("sockets", 1, "--tune --soak 2000"),
    ("sockets", 3, "calls deadlines"),
    ("sockets", 4, "deadlines --soak 2000"),
]


@pytest.mark.parametrize(
    ("network", "slices", "parts"),
    [*PROGRAMS, *(pytest.param(*program, marks=pytest.mark.full) for program in MORE)],
)
def test_layers_over_two_nodes(network, slices, parts, monkeypatch):
    monkeypatch.setenv("COMETRT_RANKS_PER_NODE", str(RANKS // 2))
    monkeypatch.setenv("NCCL_MAX_CTAS", "4")
    monkeypatch.setenv("NCCL_CGA_CLUSTER_SIZE", "1")
    # Many hardware queues are for ranks that share a process.
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    for name, value in SOCKETS.items() if network == "sockets" else ():
        monkeypatch.setenv(name, value)
    arguments = [*parts.split(), "--slices", str(slices)]
    result = mpirun(RANKS, "-m", "tests.multi.run_cuda_nodes", *arguments, timeout_sec=290)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
    assert result.stdout.count("all parts passed") == RANKS
