"""What `cometrt doctor` tries in processes of its own, which a deadline ends if they hang.

python -m cometrt.cli.probes NAME                    prints a line of JSON
mpirun -n 2 python -m cometrt.cli.probes ranks       a line from rank 0
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from cometrt.cli.ranks import RANKS

DEADLINE_SEC = 120.0
_MPI_VARIABLES = ("OMPI_", "PMI", "PMIX_", "MPI_LOCAL", "HYDRA_", "MPIR_")


class ProbeFailed(Exception):
    """The process failed, or did not end in time. The text is what it said last."""


# ---- in the doctor -----------------------------------------------------------------------------


def probe(name: str, *, ranks: int = 0, timeout_sec: float = DEADLINE_SEC) -> dict[str, Any]:
    """Run a probe in a process, or under mpirun on that many, and return what it found.

    Raises:
        ProbeFailed: after timeout_sec at the latest.
    """
    command = [sys.executable, "-m", "cometrt.cli.probes", name]
    if ranks:  # an exception on one rank ends all of them
        command = [*mpirun_command(ranks), sys.executable, "-m", "mpi4py", *command[1:]]
    said = run(command, timeout_sec)
    lines = [line for line in said.splitlines() if line.startswith("{")]
    if not lines:
        raise ProbeFailed(f"it printed nothing: {said.strip()[-300:]}")
    return dict(json.loads(lines[-1]))


def run(command: list[str], timeout_sec: float) -> str:
    """What a command prints on stdout. Nothing of it outlives this call, nor is waited for longer.

    Raises:
        ProbeFailed: if it cannot be started, fails, or does not end in time.
    """
    environment = _without_launcher()
    package = str(Path(__file__).resolve().parent.parent.parent)
    paths = [package, *filter(None, [environment.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    environment |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    # Files, not pipes: a grandchild that holds a pipe would keep its reader.
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=errors, env=environment,
                start_new_session=True, text=True,
            )  # fmt: skip
        except OSError as error:
            raise ProbeFailed(str(error)) from error
        try:
            code: int | None = process.wait(timeout_sec)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
        for file in (out, errors):
            file.seek(0)
        said, problem = out.read(), errors.read().strip()
    if code is None:
        raise ProbeFailed(f"it did not end within {timeout_sec:g} s")
    if code:
        raise ProbeFailed(f"exit status {code}: {_problem(problem or said)}")
    return said


def _without_launcher() -> dict[str, str]:
    """The environment, without what a launcher of MPI tells its processes. What the user tells
    MPI, such as OMPI_MCA_plm_rsh_agent, has the same prefixes: it stays where nothing was launched.
    """
    environment = dict(os.environ)
    if any(name in environment for name in RANKS):
        environment = {k: v for k, v in environment.items() if not k.startswith(_MPI_VARIABLES)}
    return environment


def _end(process: subprocess.Popen[str]) -> None:
    """End all that it started: first kindly, so that mpirun ends its ranks."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(3)


def _problem(text: str) -> str:
    """The line of an output that says most: the last error of Python, else the last line."""
    lines = text.strip().splitlines() or ["no output"]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Timeout|Exception)\b", line)]
    return (errors or lines)[-1].strip()[:400]


def mpirun() -> str | None:
    """The mpirun beside this Python, else the one on the PATH."""
    return shutil.which("mpirun", path=str(Path(sys.executable).parent)) or shutil.which("mpirun")


def mpirun_command(ranks: int) -> list[str]:
    """The begin of a command that starts so many processes, also where cores are too few."""
    program = mpirun()
    if program is None:
        raise ProbeFailed("there is no mpirun")
    flags = []
    if "Open MPI" in run([program, "--version"], 20):
        flags = ["--oversubscribe"]
    return [program, *flags, "-n", str(ranks)]


# ---- the probes --------------------------------------------------------------------------------


def gpus() -> dict[str, Any]:
    """GPUs, peers and NCCL as CuPy sees them."""
    import cupy

    runtime = cupy.cuda.runtime
    try:
        count = int(runtime.getDeviceCount())
    except runtime.CUDARuntimeError as error:
        return {"cupy": cupy.__version__, "gpus": [], "problem": str(error)}
    found = []
    for index in range(count):
        properties = runtime.getDeviceProperties(index)
        found.append(
            {
                "name": properties["name"].decode(),
                "capability": [properties["major"], properties["minor"]],
                "bytes": int(properties["totalGlobalMem"]),
                "sms": int(properties["multiProcessorCount"]),
            }
        )
    peers = [
        [i == j or bool(runtime.deviceCanAccessPeer(i, j)) for j in range(count)]
        for i in range(count)
    ]
    return {
        "cupy": cupy.__version__, "cuda": int(runtime.driverGetVersion()), "gpus": found,
        "peers": peers,
    }  # fmt: skip


def nccl() -> dict[str, Any]:
    """The version of NCCL; 0: there is none."""
    try:
        from cupy.cuda import nccl

        return {"version": int(nccl.get_version()) if nccl.available else 0}
    except ImportError:
        return {"version": 0}


def compiler() -> dict[str, Any]:
    """Compile one kernel, past the cache."""
    from cometrt.kernels import compiler

    with tempfile.TemporaryDirectory() as folder:
        os.environ["COMETRT_CACHE_DIR"] = folder
        begin = time.perf_counter()
        compiler.compile_cubin(compiler.kernels_folder() / "protocol" / "start_barrier.cu")
        seconds = time.perf_counter() - begin
    return {"seconds": seconds, "version": list(compiler.nvrtc_version())}


def mpi() -> dict[str, Any] | None:
    """The size of MPI.COMM_WORLD, and its library."""
    from mpi4py import MPI

    sizes = MPI.COMM_WORLD.gather(MPI.COMM_WORLD.size)
    if MPI.COMM_WORLD.rank:
        return None
    library = MPI.Get_library_version().splitlines()[0].strip("\0 ")
    return {"sizes": sizes, "library": " ".join(library.split())}


def ranks() -> dict[str, Any] | None:
    """Write to memory that ranks share, and read what the others have written."""
    from mpi4py import MPI

    import cometrt
    from cometrt.cli.ranks import gpu_count

    comm, found = MPI.COMM_WORLD, {"ranks": MPI.COMM_WORLD.size}
    with cometrt.connect(comm, "host", timeout_sec=20) as world:
        found["host"] = world.allgather(world.rank) == list(range(world.size))
    if gpu_count():
        found["cuda"] = _read_peers(comm)
    wrong = any(False in (of.get("host"), of.get("cuda")) for of in comm.allgather(found))
    return None if comm.rank else found | {"wrong": wrong}


def _read_peers(comm: Any) -> bool:
    """Whether each rank reads in the others' GPU memory what they have written."""
    import numpy as np

    import cometrt

    with cometrt.connect(comm, "cuda", timeout_sec=30) as world:
        import cupy

        runtime, count, right = cupy.cuda.runtime, 4096, True
        pointers = world.allocate(count)
        runtime.memset(pointers[world.rank], world.rank + 1, count)
        runtime.deviceSynchronize()
        world.barrier()
        for rank, pointer in enumerate(pointers):
            there = np.zeros(count, np.uint8)
            runtime.memcpy(there.ctypes.data, pointer, count, runtime.memcpyDeviceToHost)
            right &= bool((there == rank + 1).all())
        world.barrier()
    return right


PROBES = {probe.__name__: probe for probe in (gpus, nccl, compiler, mpi, ranks)}


def main() -> None:
    faulthandler.dump_traceback_later(DEADLINE_SEC, exit=True)  # if the doctor itself has gone
    found = PROBES[sys.argv[1]]()
    if found is not None:
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
