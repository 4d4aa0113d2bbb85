"""Compile kernels to cubins for sm_90a with NVRTC, without nvcc and without a GPU.

Cubins are cached under a hash of all kernel sources, the options and NVRTC's version. Files are
written under temporary names and renamed, so several ranks may compile at once. Beside each cubin
lies a report: a checksum of both, then the compiler's log. If the checksum does not match, the
kernel is compiled again. If the cache folder cannot be written, a temporary folder is used.
"""

from __future__ import annotations

import atexit
import dataclasses
import functools
import hashlib
import logging
import os
import re
import shutil
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path

from cometrt.errors import CometError
from cometrt.kernels.constants import MACROS

_log = logging.getLogger("cometrt")

ARCHITECTURE = "sm_90a"
_OPTIONS = (
    f"-arch={ARCHITECTURE}",
    "-std=c++17",
    "-default-device",
    "-lineinfo",
    "--no-cache",  # NVRTC's own cache returns no resource report
    "--ptxas-options=-v",
)

_temporary: Path | None = None  # the result of temporary_folder
_temporary_lock = threading.Lock()
_compile_locks: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)  # by cubin's name
_compile_locks_lock = threading.Lock()


@dataclasses.dataclass(frozen=True)
class Resources:
    """Resources of one kernel, as ptxas reports them. Bytes are per thread."""

    registers: int
    stack_bytes: int
    spill_bytes: int


@dataclasses.dataclass(frozen=True)
class Cubin:
    """A cached file of machine code, and the resources of each kernel in it by name."""

    path: Path
    resources: dict[str, Resources]


def kernels_folder() -> Path:
    """The folder kernels_cu: inside the installed package, or beside it in a source tree."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "kernels_cu", package.parent / "kernels_cu"):
        if folder.is_dir():
            return folder
    raise CometError(f"kernels_cu is missing beside {package}: the installation is incomplete")


def cache_folder() -> Path:
    """$COMETRT_CACHE_DIR, else cometrt in $XDG_CACHE_HOME or ~/.cache, else a temporary folder.

    Raises:
        OSError: if there is no home folder and no temporary folder can be created.
    """
    if path := os.environ.get("COMETRT_CACHE_DIR"):
        return Path(path)
    user_caches = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if user_caches.is_absolute():  # XDG's rule: ignore a relative path
        return user_caches / "cometrt"
    try:
        return Path.home() / ".cache" / "cometrt"
    except RuntimeError as error:  # HOME is unset and the user has no password entry
        return temporary_folder(str(error))


def compile_cubin(source: Path, defines: tuple[tuple[str, int], ...] = ()) -> Cubin:
    """The cubin of a .cu file: from the cache, or compiled.

    Args:
        source: the file.
        defines: macros (name, value), besides those of `cometrt.kernels.constants`.

    Raises:
        CometError: if NVRTC or the CUDA headers are missing, or with the log of a failed compile.
        OSError: if neither the cache folder nor a temporary folder can be written.
    """
    macros = [(f"COMETRT_{name}", value) for name, value in MACROS.items()]
    options = _OPTIONS + tuple(f"-D{name}={value}" for name, value in (*macros, *defines))
    text = source.read_text()
    key = hashlib.sha256(
        repr((source.name, text, options, nvrtc_version(), _sources_digest())).encode()
    ).hexdigest()[:32]
    name = f"{source.stem}-{key}.cubin"
    with _compile_locks_lock:
        lock = _compile_locks[name]
    with lock:  # ranks that are threads want the same kernel at the same time
        for folder in (cache_folder(), _temporary):
            if folder and (found := _read(folder / name)):
                return found
        begin = time.monotonic()
        _log.info("compiling %s %s", source.name, dict(defines))
        code, log = nvrtc_compile(source.name, text, options)
        path = _store(name, code, log)
        _log.info("compiled %s in %.1f s", source.name, time.monotonic() - begin)
        return Cubin(path, _parse_report(log))


def replace_files(folder: Path, contents: dict[str, bytes]) -> None:
    """Write files into the folder. `contents`: name -> bytes.

    All are written under temporary names before the first is renamed. So a reader finds an old
    file or a complete new one, and a full disk leaves the folder unchanged.

    Raises:
        OSError: if they cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        dir=folder, prefix=".new-", ignore_cleanup_errors=True
    ) as written:
        for name, data in contents.items():
            Path(written, name).write_bytes(data)
        for name in contents:
            os.replace(Path(written, name), folder / name)


def _read(path: Path) -> Cubin | None:
    """The cached cubin. None if it or its report is missing or damaged."""
    try:
        code, report = path.read_bytes(), path.with_suffix(".txt").read_bytes()
    except OSError:
        return None
    checksum, _, log = report.partition(b"\n")
    if checksum != _checksum(code, log):
        return None
    return Cubin(path, _parse_report(log.decode()))


def _store(name: str, code: bytes, log: str) -> Path:
    """Write the cubin and its report to the cache, or to a temporary folder. Returns its path."""
    report = _checksum(code, log.encode()) + b"\n" + log.encode()
    contents = {Path(name).with_suffix(".txt").name: report, name: code}
    folder = cache_folder()
    try:
        replace_files(folder, contents)
    except OSError as error:
        folder = temporary_folder(f"{folder} cannot be written ({error})")
        replace_files(folder, contents)
    return folder / name


def _checksum(code: bytes, log: bytes) -> bytes:
    return hashlib.sha256(code + log).hexdigest().encode()


def temporary_folder(reason: str) -> Path:
    """This process's temporary folder. The first call creates it and warns; exit removes it."""
    global _temporary
    with _temporary_lock:
        if _temporary is None:
            _temporary = Path(tempfile.mkdtemp(prefix="cometrt-"))
            atexit.register(_remove, _temporary, os.getpid())
            _log.warning("%s: this process uses %s as its cache", reason, _temporary)
        return _temporary


def _remove(folder: Path, owner: int) -> None:
    if os.getpid() == owner:  # not in a forked child
        shutil.rmtree(folder, ignore_errors=True)


def _sources_digest() -> str:
    """Hash of all files of kernels_cu, since a kernel may include any of them."""
    folder, digest = kernels_folder(), hashlib.sha256()
    for path in sorted(folder.rglob("*.cu*")):
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _parse_report(log: str) -> dict[str, Resources]:
    found = {}
    for part in re.split(r"Compiling entry function '", log)[1:]:
        name = part[: part.index("'")]
        stack, stores, loads = (
            int(value)
            for value in re.search(  # type: ignore[union-attr]
                r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part
            ).groups()
        )
        registers = int(re.search(r"Used (\d+) registers", part).group(1))  # type: ignore[union-attr]
        found[name] = Resources(registers, stack, stores + loads)
    return found


def nvrtc_version() -> tuple[int, int]:
    nvrtc = _nvrtc()
    error, major, minor = nvrtc.nvrtcVersion()
    _check(nvrtc, error)
    return major, minor


def nvrtc_compile(name: str, text: str, options: tuple[str, ...]) -> tuple[bytes, str]:
    nvrtc = _nvrtc()
    includes = (f"-I{kernels_folder()}", f"-I{cuda_headers()}")
    encoded = [option.encode() for option in options + includes]
    error, program = nvrtc.nvrtcCreateProgram(text.encode(), name.encode(), 0, [], [])
    _check(nvrtc, error)
    try:
        (error,) = nvrtc.nvrtcCompileProgram(program, len(encoded), encoded)
        _, size = nvrtc.nvrtcGetProgramLogSize(program)
        log = b" " * size
        nvrtc.nvrtcGetProgramLog(program, log)
        text_log = log.decode(errors="replace").rstrip("\0 \n")
        if error != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise CometError(f"NVRTC could not compile {name}:\n{text_log}")
        error, size = nvrtc.nvrtcGetCUBINSize(program)
        _check(nvrtc, error)
        code = b" " * size
        _check(nvrtc, *nvrtc.nvrtcGetCUBIN(program, code))
        return code, text_log
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _check(nvrtc: object, error: object) -> None:
    if int(error) != 0:  # type: ignore[call-overload]
        raise CometError(f"NVRTC failed: {error}")


@functools.cache
def _nvrtc():  # type: ignore[no-untyped-def]
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError) as error:
        raise CometError(
            f"compiling kernels needs cuda-bindings and NVRTC: pip install 'cometrt[cuda13]' "
            f"({error})"
        ) from error
    return nvrtc


@functools.cache
def cuda_headers() -> Path:
    """The folder with cuda_bf16.h: of the nvidia-cuda-runtime package, or of a CUDA toolkit."""
    candidates = []
    try:
        import nvidia

        candidates += [Path(p) / "cu13" / "include" for p in nvidia.__path__]
        candidates += [Path(p) / "cuda_runtime" / "include" for p in nvidia.__path__]
    except ImportError:
        pass
    candidates += [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"]
    for folder in candidates:
        if (folder / "cuda_bf16.h").exists():
            return folder
    raise CometError(
        "compiling kernels needs the CUDA headers: pip install 'cometrt[cuda13]', or set CUDA_HOME "
        f"(looked in {', '.join(map(str, candidates))})"
    )
