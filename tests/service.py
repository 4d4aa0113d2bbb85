"""NVIDIA's multi-process service, in a folder of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

PROGRAM = "nvidia-cuda-mps-control"
PIPES = "CUDA_MPS_PIPE_DIRECTORY"


@contextlib.contextmanager
def multi_process_service(folder: Path, share: int = 25) -> Iterator[dict[str, str]]:
    """Start it, yield the variables of its clients' environment, and end it: by force, where it
    does not end by itself.

    Args:
        share: percentage of a GPU's SMs that each client gets.

    Raises:
        OSError, subprocess.SubprocessError: if it does not start.
    """
    variables = {PIPES: str(folder), "CUDA_MPS_LOG_DIRECTORY": str(folder)}
    try:
        subprocess.run([PROGRAM, "-d"], check=True, timeout=20, env=os.environ | variables)
        variables["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] = str(share)
        if given := os.environ.get("CUDA_VISIBLE_DEVICES"):
            # The service has these GPUs alone, and numbers them from 0 for its clients.
            variables["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, range(given.count(",") + 1)))
        yield variables
    finally:
        end(folder)


def end(folder: Path, wait_sec: float = 30.0) -> None:
    """End the service of a folder. It ends clients that are left after five seconds."""
    command = "quit -t 5\n"
    environment = os.environ | {PIPES: str(folder)}
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        subprocess.run(
            [PROGRAM], input=command, text=True, timeout=wait_sec, env=environment,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
    deadline = time.monotonic() + 5
    while (left := processes_of(folder)) and time.monotonic() < deadline:
        time.sleep(0.1)
    for process in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def processes_of(folder: Path) -> list[int]:
    """The daemon, its servers and whatever else of NVIDIA's service was started with this folder.
    Clients are not among them."""
    found, wanted = [], f"{PIPES}={folder}".encode()
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (path / "cmdline").read_bytes().split(b"\0")[:3]
            is_service = any(Path(os.fsdecode(w)).name.startswith("nvidia-cuda-mps") for w in words)
            if is_service and wanted in (path / "environ").read_bytes().split(b"\0"):
                found.append(int(path.name))
    return found
