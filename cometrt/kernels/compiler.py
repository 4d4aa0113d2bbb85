"""Kernel sources to cubins for sm_90a, by NVRTC, without nvcc and without a GPU.

A cubin is cached under the hash of all kernel sources, the options and NVRTC's version. Files are
written under temporary names and renamed, so that many ranks may compile at once. Beside the
cubin lies its report: a checksum of both, then the compiler's log. Where the two do not agree
the kernel is compiled again; where the folder cannot be written, a temporary one of the process
serves instead.
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
    "--no-cache",  # NVRTC's own: what comes from it has no resource report
    "--ptxas-options=-v",
)

_temporary: Path | None = None  # what _temporary_folder made
_temporary_lock = threading.Lock()


@dataclasses.dataclass(frozen=True)
class Resources:
    """What ptxas reports of one kernel. Bytes are per thread."""

    registers: int
    stack_bytes: int
    spill_bytes: int


@dataclasses.dataclass(frozen=True)
class Cubin:
    """Machine code in the cache, and each kernel's resources by name."""

    path: Path
    resources: dict[str, Resources]


def kernels_folder() -> Path:
    """kernels_cu: within the installed package, or beside it in a source tree."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "kernels_cu", package.parent / "kernels_cu"):
        if folder.is_dir():
            return folder
    raise CometError(f"kernels_cu is missing beside {package}: the installation is incomplete")


def cache_folder() -> Path:
    """$COMETRT_CACHE_DIR, else cometrt in $XDG_CACHE_HOME or ~/.cache, else a temporary folder.

    Raises:
        OSError: where there is no home, and no temporary folder can be made either.
    """
    if path := os.environ.get("COMETRT_CACHE_DIR"):
        return Path(path)
    user_caches = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if user_caches.is_absolute():  # XDG's rule: others are not looked at
        return user_caches / "cometrt"
    try:
        return Path.home() / ".cache" / "cometrt"
    except RuntimeError as error:  # neither HOME nor an entry of this user
        return _temporary_folder(str(error))


def compile_cubin(source: Path, defines: tuple[tuple[str, int], ...] = ()) -> Cubin:
    """The cubin of a .cu file with those macros, from the cache where it is there, and whole.

    Raises:
        CometError: where NVRTC or CUDA's headers are missing, or with the compiler's log.
        OSError: where neither the cache nor a temporary folder can be written.
    """
    macros = [(f"COMETRT_{name}", value) for name, value in MACROS.items()]
    options = _OPTIONS + tuple(f"-D{name}={value}" for name, value in (*macros, *defines))
    text = source.read_text()
    key = hashlib.sha256(
        repr((source.name, text, options, _nvrtc_version(), _sources_digest())).encode()
    ).hexdigest()[:32]
    name = f"{source.stem}-{key}.cubin"
    for folder in (cache_folder(), _temporary):
        if folder and (found := _read(folder / name)):
            return found
    begin = time.monotonic()
    _log.info("compiling %s %s", source.name, dict(defines))
    code, log = _nvrtc_compile(source.name, text, options)
    path = _keep(name, code, log)
    _log.info("compiled %s in %.1f s", source.name, time.monotonic() - begin)
    return Cubin(path, _parse_report(log))


def replace_files(folder: Path, contents: dict[str, bytes]) -> None:
    """Write files into the folder, by name.

    All are written under temporary names before the first is renamed. So readers find an old file
    or a whole new one, and a disk that is full leaves the folder as it was.

    Raises:
        OSError: where they cannot be written.
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
    """The cached cubin; None where it or its report is missing, or not what was written."""
    try:
        code, report = path.read_bytes(), path.with_suffix(".txt").read_bytes()
    except OSError:
        return None
    checksum, _, log = report.partition(b"\n")
    if checksum != _checksum(code, log):
        return None
    return Cubin(path, _parse_report(log.decode()))


def _keep(name: str, code: bytes, log: str) -> Path:
    """Write the cubin and its report to the cache, else to a temporary folder; the cubin's path."""
    report = _checksum(code, log.encode()) + b"\n" + log.encode()
    contents = {Path(name).with_suffix(".txt").name: report, name: code}
    folder = cache_folder()
    try:
        replace_files(folder, contents)
    except OSError as error:
        folder = _temporary_folder(f"{folder} cannot be written ({error})")
        replace_files(folder, contents)
    return folder / name


def _checksum(code: bytes, log: bytes) -> bytes:
    return hashlib.sha256(code + log).hexdigest().encode()


def _temporary_folder(reason: str) -> Path:
    """This process's temporary folder, removed at exit. The first call makes it and warns."""
    global _temporary
    with _temporary_lock:
        if _temporary is None:
            _temporary = Path(tempfile.mkdtemp(prefix="cometrt-"))
            atexit.register(_remove, _temporary, os.getpid())
            _log.warning("%s: %s is the cache of this process", reason, _temporary)
        return _temporary


def _remove(folder: Path, owner: int) -> None:
    if os.getpid() == owner:  # not in a child that it forked
        shutil.rmtree(folder, ignore_errors=True)


def _sources_digest() -> str:
    """Of every file a kernel may include."""
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


def _nvrtc_version() -> tuple[int, int]:
    nvrtc = _nvrtc()
    error, major, minor = nvrtc.nvrtcVersion()
    _check(nvrtc, error)
    return major, minor


def _nvrtc_compile(name: str, text: str, options: tuple[str, ...]) -> tuple[bytes, str]:
    nvrtc = _nvrtc()
    includes = (f"-I{kernels_folder()}", f"-I{_cuda_headers()}")
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
def _cuda_headers() -> Path:
    """The folder of cuda_bf16.h: of the nvidia-cuda-runtime package, or of a toolkit."""
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
        "compiling kernels needs CUDA's headers: pip install 'cometrt[cuda13]', or set CUDA_HOME "
        f"(looked in {', '.join(map(str, candidates))})"
    )
