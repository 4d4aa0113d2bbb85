"""The device tests, on all GPUs of this host at once.

    python -m tests.gpu [--limit-sec 900] [--match orders,layer] [pytest's options]

Files whose ranks share one GPU run on each GPU one after the other, the longest first. Files that
want all GPUs run alone after them. Each file is a pytest of its own, which ends with all that it
started when it takes longer than --limit-sec. Failures are printed as they come. Exits with 1 if a
file failed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "device"
ROOT = FOLDER.parents[1]
WITH_ALL_GPUS = ("test_peers.py", "test_jax.py", "test_nodes.py", "test_cli.py")
LONGEST_FIRST = ("test_orders.py", "test_backward.py", "test_mpirun.py", "test_plan_ahead.py")
NO_TESTS = 5  # pytest's exit status: all were deselected


def files_of(match: list[str]) -> tuple[list[Path], list[Path]]:
    """Test files for one GPU each, and for all GPUs, in the order in which they begin."""
    found = [p for p in sorted(FOLDER.glob("test_*.py")) if any(m in p.name for m in match)]
    found.sort(key=lambda path: path.name not in LONGEST_FIRST)
    together = [path for path in found if path.name in WITH_ALL_GPUS]
    return [path for path in found if path not in together], together


def run(command: list[str], gpus: str, limit_sec: float) -> tuple[int, str]:
    """(exit status, output) of a command that sees these GPUs; -1 where it took too long."""
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": gpus, "COMETRT_TESTS_TELL_AT_ONCE": "1"},
        )  # fmt: skip
        try:
            code = process.wait(limit_sec)
        except subprocess.TimeoutExpired:
            code = -1
        with contextlib.suppress(ProcessLookupError):  # ranks would spin on
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        out.seek(0)
        return code, out.read()


class Runner:
    """Runs files and says how they ended.

    Args:
        options: of pytest.
    """

    def __init__(self, options: list[str], limit_sec: float) -> None:
        self._options, self._limit_sec, self._lock = options, limit_sec, threading.Lock()
        self.failed: list[str] = []

    def file(self, path: Path, gpus: str) -> None:
        begin = time.monotonic()
        command = [sys.executable, "-m", "pytest", "-q", "--gpu", str(path), "--durations=5"]
        code, output = run([*command, *self._options], gpus, self._limit_sec)
        last = output.strip().splitlines()[-1:] or ["no output"]
        with self._lock:
            if code not in (0, NO_TESTS):
                self.failed.append(path.name)
                print(output[-6000:])
            end = "was stopped" if code == -1 else last[0]
            print(f"{path.name} on GPU {gpus}, {time.monotonic() - begin:.0f} s: {end}", flush=True)

    def spread(self, files: list[Path], gpus: list[str]) -> None:
        """Each GPU takes the next file when it has ended one."""
        left: queue.SimpleQueue[Path] = queue.SimpleQueue()
        for path in files:
            left.put(path)

        def work(gpu: str) -> None:
            with contextlib.suppress(queue.Empty):
                while True:
                    self.file(left.get_nowait(), gpu)

        threads = [threading.Thread(target=work, args=(gpu,)) for gpu in gpus]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES names, or the numbers of all GPUs that the driver lists."""
    if given := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return given.split(",")
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    lines = [line for line in listed.stdout.splitlines() if line.startswith("GPU ")]
    return [str(index) for index in range(len(lines))]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--limit-sec", type=float, default=900.0, help="of a file")
    parser.add_argument(
        "--match", default="", help="comma list: files with one of these in the name"
    )
    args, options = parser.parse_known_args(argv)
    gpus = visible_gpus()
    if not gpus:
        raise SystemExit("there is no NVIDIA GPU")
    apart, together = files_of(args.match.split(","))
    runner, begin = Runner(options, args.limit_sec), time.monotonic()
    runner.spread(apart, gpus)
    for path in together:
        runner.file(path, ",".join(gpus))
    failed = f"failed: {', '.join(sorted(runner.failed))}" if runner.failed else "all passed"
    print(f"{len(apart) + len(together)} files in {time.monotonic() - begin:.0f} s, {failed}")
    sys.exit(bool(runner.failed))


if __name__ == "__main__":
    main()
