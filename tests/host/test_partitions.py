"""Which GPU a rank of spawn gets, and how GPUs come to reach each other; CUDA is a stand-in."""

import contextlib
import sys
import types

import pytest

from cometrt.errors import CometError
from cometrt.world import partitions


class Runtime:
    """What these functions use of cupy.cuda.runtime, for `gpus` that reach each other or not."""

    class CUDARuntimeError(RuntimeError):
        def __init__(self, status):
            super().__init__(status)
            self.status = status

    def __init__(self, gpus, reachable=True):
        self.gpus, self.reachable, self.current, self.enabled = gpus, reachable, 0, []

    def getDeviceCount(self):
        return self.gpus

    def deviceCanAccessPeer(self, device, peer):
        return int(self.reachable)

    def deviceEnablePeerAccess(self, peer):
        if (self.current, peer) in self.enabled:
            raise self.CUDARuntimeError(704)
        if peer >= self.gpus:
            raise self.CUDARuntimeError(101)
        self.enabled.append((self.current, peer))


@pytest.fixture
def cuda(monkeypatch):
    def install(*args, **kwargs):
        runtime = Runtime(*args, **kwargs)

        @contextlib.contextmanager
        def device(number):
            before, runtime.current = runtime.current, number
            yield
            runtime.current = before

        cupy = types.ModuleType("cupy")
        cupy.cuda = types.SimpleNamespace(runtime=runtime, Device=device)
        monkeypatch.setitem(sys.modules, "cupy", cupy)
        monkeypatch.setattr(partitions, "_whole_gpu", lambda device_id: device_id)
        monkeypatch.setattr(partitions, "split_gpu", lambda ranks: [0] * ranks)
        monkeypatch.setattr(partitions, "_rank_partition", lambda partition: partition)
        return runtime

    return install


@pytest.mark.parametrize(
    ("gpus", "ranks", "link", "share"),
    [(1, 1, None, False), (1, 1, "h100", False), (1, 2, None, True), (2, 2, None, False),
     (4, 2, None, False), (2, 2, "h100", True), (2, 3, None, True)],
)  # fmt: skip
def test_ranks_share_a_gpu_only_if_they_must_or_a_link_is_modelled(cuda, gpus, ranks, link, share):
    cuda(gpus)
    assert partitions.ranks_share_gpu(ranks, link) is share
    expected = [0] * ranks if share else list(range(ranks))
    assert partitions.rank_partitions(ranks, share=share) == expected


def test_all_pairs_reach_each_other_and_again_is_no_error(cuda):
    runtime = cuda(3)
    for _ in range(2):
        partitions.rank_partitions(3, share=False)
    assert sorted(runtime.enabled) == [(a, b) for a in range(3) for b in range(3) if a != b]
    assert runtime.current == 0


def test_what_cannot_be_reached_is_told(cuda):
    cuda(2, reachable=False)
    with pytest.raises(CometError, match="GPU 0 cannot reach the memory of GPU 1"):
        partitions.rank_partitions(2, share=False)


def test_other_errors_of_cuda_are_not_swallowed(cuda):
    runtime = cuda(1)
    with pytest.raises(Runtime.CUDARuntimeError):
        partitions.rank_partitions(2, share=False)
    assert not runtime.enabled
