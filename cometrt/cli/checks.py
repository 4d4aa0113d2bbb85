"""The checks of `cometrt doctor`. Each yields lines.

Whatever may hang, such as a driver or a launcher, runs in a process that a deadline ends.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import cometrt
from cometrt.cli.output import size
from cometrt.cli.probes import ProbeFailed, mpirun, probe, run
from cometrt.kernels.compiler import cache_folder

OK, NOTE, SKIPPED, FAILED = "ok", "note", "skipped", "failed"
NO_GPU = "no GPU: skipped"
MPS = "nvidia-cuda-mps-control"
INSTALL_CUDA = "pip install 'cometrt[cuda13]'"
_LEAST_SHARED = 1 << 26  # bytes of /dev/shm: what a container gets that asks for nothing
_LEAST_CACHE = 1 << 28


@dataclasses.dataclass(frozen=True)
class Line:
    """A check's outcome. `advice` says what to do, of a note or a failure."""

    check: str
    state: str
    text: str
    advice: str = ""


class Machine:
    """What several checks need, found out once."""

    @functools.cached_property
    def has_driver(self) -> bool:
        """Whether there is an NVIDIA driver, and so probably a GPU."""
        return Path("/proc/driver/nvidia/version").exists() or bool(shutil.which("nvidia-smi"))

    @functools.cached_property
    def cupy(self) -> str:
        """CuPy's version; "": it is not installed."""
        return version_of("cupy-cuda13x", "cupy-cuda12x", "cupy")

    @functools.cached_property
    def found(self) -> dict[str, Any]:
        """What `probes.gpus` says; {"problem": ...} if it fails."""
        if not self.cupy:
            return {"gpus": [], "problem": "CuPy is not installed"}
        try:
            return probe("gpus")
        except ProbeFailed as error:
            return {"gpus": [], "problem": f"asking CUDA failed: {error}"}

    @property
    def gpus(self) -> list[dict[str, Any]]:
        return list(self.found["gpus"])


def version_of(*names: str) -> str:
    """The version of the first of these distributions that is installed, else ""."""
    for name in names:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return ""


def check_packages(machine: Machine) -> Iterator[Line]:
    names = {"NumPy": "numpy", "mpi4py": "mpi4py", "matplotlib": "matplotlib"}
    versions = {name: version_of(package) for name, package in names.items()}
    versions |= {"CuPy": machine.cupy}
    there = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    text = f"cometrt {cometrt.__version__}, Python {platform.python_version()}, {there}"
    yield Line("packages", OK, text)
    if not versions["matplotlib"]:
        advice = "for pictures of timelines: pip install 'cometrt[plot]'"
        yield Line("packages", NOTE, "matplotlib is not installed", advice)


def check_gpus(machine: Machine) -> Iterator[Line]:
    if not machine.gpus:
        if not machine.has_driver:
            yield Line("GPU", SKIPPED, NO_GPU)
        else:
            advice = "see what nvidia-smi says, and CUDA_VISIBLE_DEVICES"
            if not machine.cupy:
                advice = INSTALL_CUDA
            elif _runs(MPS) and os.environ.get("CUDA_VISIBLE_DEVICES"):
                advice += (
                    ": the multi-process service numbers the GPUs that its daemon saw from 0, "
                    "and clients use these numbers"
                )
            text = f"there is a driver, and no GPU to use: {machine.found.get('problem', '')}"
            yield Line("GPU", FAILED, text, advice)
        return
    names = [f"{gpu['name']} ({size(gpu['bytes'])}, {gpu['sms']} SMs)" for gpu in machine.gpus]
    text = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    if all(gpu["capability"] == [9, 0] for gpu in machine.gpus):
        yield Line("GPU", OK, text)
    else:
        advice = "kernels run on Hopper GPUs (H100, H200) only; device='host' runs anywhere"
        yield Line("GPU", FAILED, text, advice)
    cuda = machine.found["cuda"]
    text = f"{_driver()} for CUDA {cuda // 1000}.{cuda % 1000 // 10}"
    if cuda >= 13000:
        yield Line("driver", OK, text)
    else:
        yield Line("driver", FAILED, text, "install a driver for CUDA 13.0 or newer: 580 or newer")


def _driver() -> str:
    try:
        first = Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
        return next(word for word in first.split() if word[0].isdigit() and "." in word)
    except (OSError, IndexError, StopIteration):
        return "driver"


def check_compiler(machine: Machine) -> Iterator[Line]:
    if not version_of("cuda-bindings"):
        extra = "cuda13" if machine.has_driver else "compile"
        state = FAILED if machine.has_driver else NOTE
        text = "not installed; it compiles kernels for GPUs"
        yield Line("NVRTC", state, text, f"pip install 'cometrt[{extra}]'")
        return
    try:
        found = probe("compiler")
    except ProbeFailed as error:
        yield Line("NVRTC", FAILED, f"a kernel was not compiled: {error}", INSTALL_CUDA)
        return
    version = ".".join(map(str, found["version"]))
    text = f"NVRTC {version} compiled a kernel in {found['seconds']:.1f} s"
    cuda = machine.found.get("cuda", 0)
    if cuda and tuple(found["version"]) > (cuda // 1000, cuda % 1000 // 10):
        advice = "pip install 'nvidia-cuda-nvrtc==13.0.*'"
        yield Line("NVRTC", FAILED, f"{text}, newer than the driver's CUDA", advice)
    else:
        yield Line("NVRTC", OK, text)


def check_cache(machine: Machine) -> Iterator[Line]:
    advice = "set COMETRT_CACHE_DIR to a folder that can be written, on a local disk"
    try:
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"cometrt")
        cubins = [path.stat().st_size for path in folder.glob("*.cubin")]
        free = shutil.disk_usage(folder).free
    except OSError as error:
        yield Line("cache", FAILED, f"it cannot be written: {error}", advice)
        return
    tuned = ", tuned.json" if (folder / "tuned.json").exists() else ""
    text = f"{folder}: {len(cubins)} kernels, {size(sum(cubins))}{tuned}; {size(free)} free"
    yield Line("cache", *((OK, text) if free >= _LEAST_CACHE else (NOTE, text, advice)))


def check_shared_memory(machine: Machine) -> Iterator[Line]:
    advice = "of a container: start it with --shm-size=1g or --ipc=host"
    try:
        with tempfile.TemporaryFile(dir="/dev/shm") as file:
            file.write(b"cometrt")
        found = os.statvfs("/dev/shm")
    except OSError as error:
        if platform.system() == "Linux":
            yield Line("/dev/shm", FAILED, f"MPI and NCCL cannot use it: {error}", advice)
        else:
            yield Line("/dev/shm", SKIPPED, f"{platform.system()} has none")
        return
    free, total = found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize
    text = f"{size(free)} free of {size(total)}"
    yield Line("/dev/shm", *((OK, text) if free > _LEAST_SHARED else (NOTE, text, advice)))


def check_mpi(machine: Machine) -> Iterator[Line]:
    if not version_of("mpi4py"):
        advice = "for a process a rank: pip install 'cometrt[mpi]'"
        yield Line("MPI", NOTE, "mpi4py is not installed", advice)
        return
    launcher = mpirun()
    if launcher is None:
        advice = "install the mpirun of mpi4py's MPI library, or pip install 'cometrt[mpi]'"
        yield Line("MPI", FAILED, "there is no mpirun", advice)
        return
    advice = (
        "use the mpirun that belongs to the MPI library of mpi4py; `pip install mpich` brings both"
    )
    try:
        found = probe("mpi", ranks=2, timeout_sec=60)
    except ProbeFailed as error:
        yield Line("MPI", FAILED, f"{launcher} does not start two ranks: {error}", advice)
        return
    text = f"{launcher}, {found['library']}"
    if found["sizes"] != [2, 2]:
        yield Line("MPI", FAILED, f"two ranks do not see each other: {text}", advice)
        return
    yield Line("MPI", OK, text)
    yield from _check_ranks(machine)


def _check_ranks(machine: Machine) -> Iterator[Line]:
    ranks = min(max(2, len(machine.gpus)), 8)
    advice = (
        "run all ranks in one container and as one user, let each see all GPUs "
        "(CUDA_VISIBLE_DEVICES), and give the container --ipc=host"
    )
    try:
        found = probe("ranks", ranks=ranks)
    except ProbeFailed as error:
        yield Line("IPC", FAILED, f"{ranks} ranks cannot share memory: {error}", advice)
        return
    if found["wrong"]:
        yield Line("IPC", FAILED, f"{ranks} ranks read wrong bytes from each other", advice)
        return
    what = "host and GPU memory" if "cuda" in found else "host memory"
    yield Line("IPC", OK, f"{ranks} processes read each other's {what}")
    if "cuda" not in found:
        yield Line("IPC of GPUs", SKIPPED, NO_GPU)


def check_multi_process_service(machine: Machine) -> Iterator[Line]:
    if not machine.gpus:
        yield Line("MPS", SKIPPED, NO_GPU)
    elif _runs(MPS):
        yield Line("MPS", OK, "NVIDIA's multi-process service runs")
    else:
        text = "NVIDIA's multi-process service is off; only ranks that share a GPU need it"
        yield Line("MPS", OK, text)


def _runs(program: str) -> bool:
    """Whether a process of that name runs."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            name = path.read_bytes().split(b"\0")[0].decode(errors="replace")
        except OSError:
            continue
        if Path(name).name == program:
            return True
    return False


def check_peers(machine: Machine) -> Iterator[Line]:
    gpus = len(machine.gpus)
    if not gpus:
        yield Line("peer access", SKIPPED, NO_GPU)
    elif gpus == 1:
        yield Line("peer access", SKIPPED, "one GPU has no peers; virtual ranks share it")
    else:
        peers = machine.found["peers"]
        rows = (f"{i}: {' '.join('-x'[can] for can in reached)}" for i, reached in enumerate(peers))
        if all(map(all, peers)):
            yield Line("peer access", OK, f"all {gpus} GPUs reach each other{_links()}")
        else:
            advice = "use GPUs that reach each other; in a virtual machine, see its NVLink and ACS"
            yield Line("peer access", FAILED, f"x: reaches it; {'; '.join(rows)}", advice)


def _links() -> str:
    """How GPUs are connected, as nvidia-smi names it."""
    try:
        said = run(["nvidia-smi", "topo", "-m"], 20)
    except ProbeFailed:
        return ""
    words = [word for line in said.splitlines() if line.startswith("GPU") for word in line.split()]
    kinds = {w for w in words if w in ("PIX", "PXB", "PHB", "NODE", "SYS") or _is_nvlink(w)}
    return f" by {', '.join(sorted(kinds))}" if kinds else ""


def _is_nvlink(word: str) -> bool:
    return word.startswith("NV") and word[2:].isdigit()


def check_nccl(machine: Machine) -> Iterator[Line]:
    if not machine.gpus:
        yield Line("NCCL", SKIPPED, NO_GPU)
        return
    try:
        number = probe("nccl")["version"]
    except ProbeFailed as error:
        yield Line("NCCL", NOTE, str(error), "bench then measures without NCCL")
        return
    if number:
        text = f"{number // 10000}.{number % 10000 // 100}.{number % 100}"
        yield Line("NCCL", OK, text)
    else:
        advice = "only bench compares with it: pip install nvidia-nccl-cu13"
        yield Line("NCCL", NOTE, "not installed", advice)


CHECKS: dict[str, Callable[[Machine], Iterator[Line]]] = {
    "packages": check_packages,
    "GPUs": check_gpus,
    "compiling a kernel": check_compiler,
    "the cache folder": check_cache,
    "/dev/shm": check_shared_memory,
    "MPI, and memory that ranks share": check_mpi,
    "the multi-process service": check_multi_process_service,
    "peer access": check_peers,
    "NCCL": check_nccl,
}
