"""`python -m tests.gpu`, without a GPU: pytest is a stand-in."""

import os
import sys
import time

import pytest

from tests import gpu


def test_every_device_test_is_in_one_of_both_lists():
    apart, together = gpu.files_of([""])
    assert sorted(apart + together) == sorted(gpu.FOLDER.glob("test_*.py"))
    assert {path.name for path in together} == set(gpu.WITH_ALL_GPUS)
    assert {path.name for path in apart[:4]} == set(gpu.LONGEST_FIRST)
    assert [path.name for path in gpu.files_of(["orders", "peers"])[0]] == ["test_orders.py"]


def test_a_command_ends_with_all_that_it_started(tmp_path):
    child = "import time; time.sleep(60)"
    code = f"""
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {child!r}])
print(os.environ["CUDA_VISIBLE_DEVICES"], child.pid, flush=True)
time.sleep(60)
"""
    begin = time.monotonic()
    status, output = gpu.run([sys.executable, "-c", code], "1,2", 3.0)
    assert (status, time.monotonic() - begin < 30) == (-1, True)
    gpus, child_pid = output.split()
    assert gpus == "1,2"
    for _ in range(100):  # until it is gone, or a zombie that nobody waits for
        try:
            with open(f"/proc/{child_pid}/stat") as file:
                if file.read().rsplit(")", 1)[1].split()[0] == "Z":
                    return
        except FileNotFoundError:
            return
        time.sleep(0.1)
    raise AssertionError("the child runs on")


@pytest.mark.parametrize("status", [0, 1, -1, gpu.NO_TESTS])
def test_files_are_spread_over_gpus_and_failures_are_told(monkeypatch, capsys, status):
    ran = []

    def run(command, gpus, limit_sec):
        name = os.path.basename(command[5])
        ran.append((name, gpus))
        time.sleep(0.02)
        return (status if name == "test_layer.py" else 0), f"output of {name}\n3 passed"

    monkeypatch.setattr(gpu, "run", run)
    monkeypatch.setattr(gpu, "visible_gpus", lambda: ["0", "1"])
    with pytest.raises(SystemExit) as end:
        gpu.main(["--match", "layer,orders,plan,peers", "-x"])
    failed = status in (1, -1)
    assert end.value.code == failed
    said = capsys.readouterr().out
    assert ("output of test_layer.py" in said) == failed
    assert ("failed: test_layer.py" in said) == failed
    assert {gpus for name, gpus in ran if name != "test_peers.py"} == {"0", "1"}
    assert ran[-1] == ("test_peers.py", "0,1")
    assert len(ran) == len(set(ran)) == 5


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr(gpu, "visible_gpus", list)
    with pytest.raises(SystemExit, match="no NVIDIA GPU"):
        gpu.main([])
