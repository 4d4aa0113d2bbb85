"""The multi-process service that tests on GPUs start: with a program in its place."""

import os
import subprocess
import sys
import time

import pytest

from tests.service import PROGRAM, multi_process_service, processes_of

# With -d it leaves a process that runs on, and writes what that one sees. Without, it reads a
# command; HANGS says that it does not obey.
SERVICE = """#!{python}
import os, signal, subprocess, sys, time
folder = os.environ["CUDA_MPS_PIPE_DIRECTORY"]
if "-d" in sys.argv:
    if os.environ.get("BROKEN"):
        sys.exit(1)
    child = subprocess.Popen([sys.executable, sys.argv[0], "-run"], start_new_session=True)
    open(folder + "/pid", "w").write(str(child.pid))
    open(folder + "/sees", "w").write(os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
elif "-run" in sys.argv:
    time.sleep(60)
else:
    open(folder + "/said", "w").write(sys.stdin.read())
    if not os.environ.get("HANGS"):
        os.kill(int(open(folder + "/pid").read()), signal.SIGTERM)
"""


@pytest.fixture
def program(tmp_path, monkeypatch):
    path = tmp_path / "bin" / PROGRAM
    path.parent.mkdir()
    path.write_text(SERVICE.format(python=sys.executable))
    path.chmod(0o755)
    monkeypatch.setenv("PATH", str(path.parent), prepend=os.pathsep)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize("hangs", [False, True])
def test_nothing_of_a_service_is_left_even_if_it_hangs(program, hangs, tmp_path, monkeypatch):
    if hangs:
        monkeypatch.setenv("HANGS", "1")
    with multi_process_service(tmp_path):
        (pid,) = processes_of(tmp_path)
        assert pid == int((tmp_path / "pid").read_text())
        assert processes_of(tmp_path / "bin") == []
    time.sleep(0.1)
    assert processes_of(tmp_path) == []
    assert (tmp_path / "said").read_text() == "quit -t 5\n"


@pytest.mark.parametrize(
    ("given", "clients"), [("1", "0"), ("2,3", "0,1"), ("GPU-12,GPU-34", "0,1"), (None, None)]
)
def test_clients_number_the_gpus_that_the_service_has(
    program, given, clients, tmp_path, monkeypatch
):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if given:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    with multi_process_service(tmp_path) as variables:
        assert variables.get("CUDA_VISIBLE_DEVICES") == clients
        assert (tmp_path / "sees").read_text() == (given or "all")


def test_a_service_that_does_not_start_is_an_error(program, tmp_path, monkeypatch):
    monkeypatch.setenv("BROKEN", "1")
    with pytest.raises(subprocess.CalledProcessError), multi_process_service(tmp_path):
        pass
