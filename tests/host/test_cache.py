"""The cache of kernels: where it is, and that neither a folder nor a file in it stops a layer.

NVRTC is replaced: what matters here is the files.
"""

import errno
import logging
import os
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from cometrt.kernels import compiler
from cometrt.kernels.compiler import cache_folder, compile_cubin, replace_files
from cometrt.plan import TileConfig
from cometrt.tuner import cache
from tests.launch import ROOT

CODE = b"\x7fELF" + bytes(range(256)) * 8
LOG = """ptxas info    : Compiling entry function 'k' for 'sm_90a'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 20 registers, used 1 barriers"""
KEY = cache.Key("a GPU", 132, 1, 1, 1, 16, 16, 1, 1, 1, "bfloat16", "none")


@pytest.fixture(autouse=True)
def compiled(monkeypatch, tmp_path):
    """Names of what was compiled; a cache of its own, and no temporary folder of other tests."""
    names = []

    def compile_one(name, text, options):
        names.append(name)
        return CODE, LOG

    monkeypatch.setattr(compiler, "nvrtc_compile", compile_one)
    monkeypatch.setattr(compiler, "nvrtc_version", lambda: (13, 0))
    monkeypatch.setattr(compiler, "_temporary", None)
    monkeypatch.setenv("COMETRT_CACHE_DIR", str(tmp_path / "cache"))
    return names


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "k.cu"
    path.write_text("a kernel")
    return path


def check_whole(cubin):
    assert cubin.path.read_bytes() == CODE
    assert cubin.resources == {"k": compiler.Resources(20, 0, 0)}
    assert sorted(p.suffix for p in cubin.path.parent.iterdir()) == [".cubin", ".txt"]


# ---- where it is ---------------------------------------------------------------------------------


def no_home():
    raise RuntimeError("Could not determine home directory.")


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({"COMETRT_CACHE_DIR": "/a", "XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/a"),
        ({"XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/b/cometrt"),
        ({"HOME": "/c"}, "/c/.cache/cometrt"),
        ({"COMETRT_CACHE_DIR": "", "XDG_CACHE_HOME": "", "HOME": "/c"}, "/c/.cache/cometrt"),
        ({"XDG_CACHE_HOME": "relative", "HOME": "/c"}, "/c/.cache/cometrt"),  # as its standard says
    ],
)
def test_the_folder_follows_the_environment(variables, folder, monkeypatch):
    for name in ("COMETRT_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == Path(folder)


def test_without_a_home_the_folder_is_that_of_xdg(monkeypatch):
    monkeypatch.delenv("COMETRT_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    monkeypatch.setattr(Path, "home", no_home)
    assert cache_folder() == Path("/b/cometrt")


def test_without_any_folder_a_temporary_one_serves_with_one_warning(
    monkeypatch, source, compiled, caplog
):
    monkeypatch.delenv("COMETRT_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    cubin = compile_cubin(source)
    check_whole(cubin)
    assert compile_cubin(source) == cubin
    assert cache.load(cache.cache_file(), KEY) is None
    cache.store(cache.cache_file(), KEY, TileConfig(num_phases=3), {"forward": 1.0})
    assert cache.load(cache.cache_file(), KEY) == TileConfig(num_phases=3)
    assert compiled == ["k.cu"]
    assert [r.levelno for r in caplog.records] == [logging.WARNING]
    assert str(cubin.path.parent) in caplog.text
    assert "Could not determine home directory" in caplog.text


def test_the_temporary_folder_ends_with_the_process_that_made_it(tmp_path):
    code = """
import os, sys
from cometrt.kernels import compiler
folder = compiler.temporary_folder("a test")
(folder / "file").write_text("")
if os.fork() == 0:
    sys.exit()
os.wait()
assert (folder / "file").exists(), "removed by a child"
print(folder)
"""
    environment = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60
    )
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.strip()).parent == tmp_path
    assert not list(tmp_path.iterdir())


# ---- folders and disks that take nothing ---------------------------------------------------------


@pytest.mark.parametrize("kind", ["parent is a file", "in /proc", "is a file"])
def test_a_folder_that_cannot_be_written_is_one_warning(
    kind, tmp_path, source, compiled, monkeypatch, caplog
):
    (tmp_path / "file").write_text("")
    folder = {"parent is a file": tmp_path / "file" / "cache", "in /proc": "/proc/cometrt"}
    monkeypatch.setenv("COMETRT_CACHE_DIR", str(folder.get(kind, tmp_path / "file")))
    first, second = compile_cubin(source), compile_cubin(source, (("VALUE", 2),))
    assert first.path.parent == second.path.parent
    assert first.path.read_bytes() == second.path.read_bytes() == CODE
    assert compile_cubin(source) == first
    assert len(compiled) == 2
    assert [r.levelno for r in caplog.records] == [logging.WARNING]


def test_ranks_of_a_process_warn_once_together(tmp_path, source, monkeypatch, caplog):
    monkeypatch.setenv("COMETRT_CACHE_DIR", "/proc/cometrt")
    cubins = compile_at_once(source)
    assert len(set(cubins)) == 1
    assert len(caplog.records) == 1


def compile_at_once(source, ranks=6):
    cubins = [None] * ranks
    start = threading.Barrier(ranks)

    def compile_one(rank):
        start.wait()
        cubins[rank] = compile_cubin(source).path

    threads = [threading.Thread(target=compile_one, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return cubins


@pytest.mark.parametrize("failing", ["k-", ".txt", ".cubin"])
def test_a_rename_that_fails_leaves_no_temporary_file(
    failing, tmp_path, source, monkeypatch, caplog
):
    folder, rename = tmp_path / "cache", os.replace

    def full(old, new):
        if Path(new).parent == folder and failing in Path(new).name:
            raise OSError(errno.ENOSPC, "No space left on device")
        rename(old, new)

    monkeypatch.setattr(os, "replace", full)
    check_whole(compile_cubin(source))
    assert len(caplog.records) == 1
    assert not [p for p in folder.iterdir() if p.suffix != ".txt"]


def test_a_full_disk_leaves_nothing_behind(tmp_path):
    # A limit on the size of files fails in the middle of a write, as a full disk does.
    folder, (soft, hard) = tmp_path / "cache", resource.getrlimit(resource.RLIMIT_FSIZE)
    replace_files(folder, {"old": b"whole"})
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
        with pytest.raises(OSError, match="File too large"):
            replace_files(folder, {"small": b"1", "old": bytes(2 << 20)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in folder.iterdir()] == ["old"]
    assert (folder / "old").read_bytes() == b"whole"


def test_a_full_disk_is_a_warning_of_the_tuner(tmp_path, monkeypatch, caplog):
    def full(old, new):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    cache.store(tmp_path / "cache" / "tuned.json", KEY, TileConfig(), {"forward": 1.0})
    assert "is not stored" in caplog.text
    assert not list((tmp_path / "cache").iterdir())


# ---- files that are not whole --------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".cubin", ".txt"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:1],
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1],
        lambda data: bytes(len(data)),
        lambda data: data + b"\0",
        lambda data: data[:-9] + b"\xff" + data[-8:],
    ],
)
def test_a_file_that_is_not_whole_is_compiled_again(suffix, damage, source, compiled, caplog):
    cubin = compile_cubin(source)
    path = cubin.path.with_suffix(suffix)
    path.write_bytes(damage(path.read_bytes()))
    assert compile_cubin(source) == cubin
    check_whole(cubin)
    assert len(compiled) == 2
    assert compile_cubin(source) == cubin
    assert len(compiled) == 2
    assert not caplog.records


@pytest.mark.parametrize("suffix", [".cubin", ".txt"])
def test_a_file_that_is_missing_or_cannot_be_read_is_compiled_again(suffix, source, compiled):
    cubin = compile_cubin(source)
    cubin.path.with_suffix(suffix).unlink()
    assert compile_cubin(source) == cubin
    cubin.path.with_suffix(suffix).unlink()
    cubin.path.with_suffix(suffix).mkdir()
    elsewhere = compile_cubin(source)
    check_whole(elsewhere)
    assert elsewhere.path.parent != cubin.path.parent
    assert len(compiled) == 3


class NewLocks:
    """Processes share no lock."""

    def __getitem__(self, name):
        return threading.Lock()


@pytest.mark.parametrize("threads", [True, False])
def test_ranks_replace_a_torn_file_together(source, compiled, threads, monkeypatch):
    """Threads of one process compile it once."""
    cubin = compile_cubin(source)
    cubin.path.write_bytes(CODE[:100])
    compile_one = compiler.nvrtc_compile

    def slowly(*arguments):
        time.sleep(0.05)
        return compile_one(*arguments)

    monkeypatch.setattr(compiler, "nvrtc_compile", slowly)
    if not threads:
        monkeypatch.setattr(compiler, "_compile_locks", NewLocks())
    assert set(compile_at_once(source)) == {cubin.path}
    assert (len(compiled) == 2) == threads
    check_whole(cubin)


def test_torn_tuned_configs_are_passed_over_and_replaced(tmp_path, caplog):
    path = tmp_path / "tuned.json"
    cache.store(path, KEY, TileConfig(num_phases=3), {"forward": 1.0})
    whole = path.read_bytes()
    for torn in (*(whole[:n] for n in range(0, len(whole) - 2, 7)), bytes(len(whole))):
        path.write_bytes(torn)
        caplog.clear()
        cache.warn_once.cache_clear()
        assert cache.load(path, KEY) is None
        assert len(caplog.records) == 1
        cache.store(path, KEY, TileConfig(num_phases=3), {"forward": 1.0})
        assert path.read_bytes() == whole
