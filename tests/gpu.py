"""The device tests, on all GPUs of this host at once.

    python -m tests.gpu [options] [pytest's options]

    --match orders,layer  files with one of these in the name
    --limit-sec 900       of one pytest
    --keep FILE           pass over what has passed before with the same tree and pytest's options
    --within-sec 600      begin nothing that would probably end later
    --logs FOLDER         keep the output of each pytest

First all kernels that are not cached are compiled, on all cores.
Each file is a pytest of its own, which ends with all that it started. A long file is several: each
runs a part of its tests. Files whose ranks share one GPU run on each GPU one after the other, the
longest first. Then those for two GPUs run on each pair of them, and last those for all GPUs, alone.
Failures are printed as they come. Exits with 1 unless all have passed, now or before.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).resolve().parent / "device"
ROOT = FOLDER.parents[1]
WITH_TWO_GPUS = ("test_cli.py", "test_jax_pairs.py")
WITH_ALL_GPUS = ("test_peers.py", "test_jax_ranks.py", "test_nodes.py")
# Measured on H200s, four of them for what wants several. The order and the parts depend on them.
SECONDS = {
    "test_backward.py": 258, "test_mpirun.py": 164, "test_tune.py": 149, "test_orders.py": 129,
    "test_peers.py": 130, "test_plan_ahead.py": 94, "test_layer.py": 93, "test_sanitizer.py": 82,
    "test_grad_engine.py": 71, "test_cli.py": 69, "test_held_calls.py": 68, "test_soak.py": 33,
    "test_trace.py": 32, "test_engine.py": 24, "test_async.py": 22, "test_router.py": 20,
    "test_chunked.py": 19, "test_failures.py": 17, "test_arrays.py": 16, "test_progress.py": 15,
    "test_docs.py": 14, "test_plan.py": 12, "test_memory.py": 10, "test_stats.py": 6,
    "test_toolchain.py": 5,
}  # fmt: skip
UNKNOWN_SEC = 60.0
PART_SEC = 60.0  # a longer file for one GPU has several parts
MAX_BLAS_THREADS = 16
NO_TESTS = 5  # pytest's exit status: all were deselected
TREE = ("cometrt", "kernels_cu", "tests", "examples", "benchmarks", "pyproject.toml")
NUM_SLOWEST = 15  # tests that the summary names
DURATION = re.compile(r"^(\d+\.\d+)s (?:call|setup|teardown) +(\S.*)$", re.MULTILINE)


class Job(NamedTuple):
    """One pytest: a file, or a part of it."""

    path: Path
    part: int = 1
    parts: int = 1

    def __str__(self) -> str:
        return self.path.name + (f" {self.part}/{self.parts}" if self.parts > 1 else "")

    @property
    def arguments(self) -> list[str]:
        return [str(self.path), f"--part={self.part}/{self.parts}"]

    @property
    def seconds(self) -> float:
        """As measured for the whole file."""
        return SECONDS.get(self.path.name, UNKNOWN_SEC) / self.parts


def jobs_of(match: list[str]) -> tuple[list[Job], list[Job], list[Job]]:
    """Jobs for one GPU each, for two GPUs, and for all GPUs."""
    found: tuple[list[Job], list[Job], list[Job]] = [], [], []
    for path in sorted(FOLDER.glob("test_*.py")):
        if not any(word in path.name for word in match):
            continue
        if path.name in WITH_TWO_GPUS + WITH_ALL_GPUS:
            found[1 + (path.name in WITH_ALL_GPUS)].append(Job(path))
            continue
        parts = -int(-Job(path).seconds // PART_SEC)
        found[0].extend(Job(path, part, parts) for part in range(1, parts + 1))
    return found


def name_on(job: Job, gpus: str) -> str:
    """On one GPU ranks share it; on several their number may depend on it."""
    count = gpus.count(",") + 1
    return f"{job} on {count} GPUs" if count > 1 else str(job)


def tree_digest(options: list[str]) -> str:
    """Of all that the tests depend on, and of pytest's options."""
    digest = hashlib.sha256(repr(options).encode())
    for name in TREE:
        top = ROOT / name
        for path in sorted(top.rglob("*")) if top.is_dir() else [top]:
            inside = path.relative_to(ROOT)
            if path.is_file() and not {"__pycache__", "results"} & set(inside.parts):
                digest.update(f"{inside} {path.stat().st_size}\n".encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()


class Kept:
    """What other runs have found, in a file; None: in no file.

    Attributes:
        passed: names of jobs that have passed with this tree and these options of pytest.
        seconds: how long jobs took, with any tree, by name.
    """

    def __init__(self, path: Path | None, options: list[str]) -> None:
        self._path, self._digest = path, tree_digest(options) if path else ""
        self.passed: list[str] = []
        self.seconds: dict[str, float] = {}
        if path and path.exists():
            found = json.loads(path.read_text())
            self.seconds = found["seconds"]
            self.passed = found["passed"] if found["tree"] == self._digest else []

    def add(self, name: str, seconds: float, *, passed: bool) -> None:
        self.seconds[name] = round(seconds, 1)
        self.passed += [name] * passed
        if self._path:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            new = self._path.with_name(self._path.name + ".new")
            found = {"tree": self._digest, "passed": self.passed, "seconds": self.seconds}
            new.write_text(json.dumps(found, indent=1))
            new.replace(self._path)


def run(command: list[str], gpus: str, limit_sec: float, threads: int = 1) -> tuple[int, str]:
    """(exit status, output) of a command that sees these GPUs; -1 where it took too long.

    Args:
        threads: of a BLAS, which would start one for each core of the host in each process.
    """
    environment = {"OPENBLAS_NUM_THREADS": str(threads)} | os.environ
    environment |= {"CUDA_VISIBLE_DEVICES": gpus, "COMETRT_TESTS_TELL_AT_ONCE": "1"}
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True,
            env=environment,
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
    """Runs jobs and says how they ended.

    Args:
        options: of pytest.
        within_sec: from now on; no job begins that would probably end later.
        logs: folder for the outputs; None: they are not kept.

    Attributes:
        failed, earlier, left: names of jobs that failed, had passed before, or were not begun.
        slowest: (seconds, test) of all tests that took long.
    """

    def __init__(
        self,
        options: list[str],
        limit_sec: float,
        kept: Kept,
        within_sec: float = float("inf"),
        logs: Path | None = None,
    ) -> None:
        self._options, self._limit_sec, self._kept, self._logs = options, limit_sec, kept, logs
        self._end, self._lock = time.monotonic() + within_sec, threading.Lock()
        self.failed: list[str] = []
        self.earlier: list[str] = []
        self.left: list[str] = []
        self.slowest: list[tuple[float, str]] = []
        self.num_run = 0

    def seconds(self, job: Job, gpus: str) -> float:
        """That it will probably take."""
        return self._kept.seconds.get(name_on(job, gpus), job.seconds)

    def job(self, job: Job, gpus: str, threads: int) -> None:
        """Run it on these GPUs, unless it has passed on as many before."""
        name, begin = name_on(job, gpus), time.monotonic()
        with self._lock:
            if name in self._kept.passed:
                self.earlier.append(name)
                return
            if begin + self.seconds(job, gpus) > self._end:
                self.left.append(name)
                return
            self.num_run += 1
        command = [sys.executable, "-m", "pytest", "-q", "--gpu", *job.arguments]
        command += ["--durations=10", "--durations-min=0.5", *self._options]
        code, output = run(command, gpus, self._limit_sec, threads)
        seconds = time.monotonic() - begin
        if self._logs:
            self._logs.mkdir(parents=True, exist_ok=True)
            (self._logs / f"{job}.txt".replace(" ", "-").replace("/", "-of-")).write_text(output)
        last = output.strip().splitlines()[-1:] or ["no output"]
        with self._lock:
            self.slowest += [(float(sec), test) for sec, test in DURATION.findall(output)]
            if code != -1:
                self._kept.add(name, seconds, passed=code in (0, NO_TESTS))
            if code not in (0, NO_TESTS):
                self.failed.append(name)
                print(output[-6000:])
            end = "was stopped" if code == -1 else last[0]
            print(f"{job} on GPU {gpus}, {seconds:.0f} s: {end}", flush=True)

    def spread(self, jobs: list[Job], groups: list[str]) -> None:
        """Each group of GPUs takes the longest job that is left when it has ended one."""
        left: queue.SimpleQueue[Job] = queue.SimpleQueue()
        for job in sorted(jobs, key=lambda job: -self.seconds(job, groups[0])):
            left.put(job)
        threads_each = max(1, min(MAX_BLAS_THREADS, num_cores() // len(groups)))

        def work(gpus: str) -> None:
            with contextlib.suppress(queue.Empty):
                while True:
                    self.job(left.get_nowait(), gpus, threads_each)

        threads = [threading.Thread(target=work, args=(gpus,)) for gpus in groups]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def summary(self, seconds: float) -> str:
        lines = []
        if self.slowest:
            self.slowest.sort(reverse=True)
            tests = (f"  {sec:6.1f} s {test}" for sec, test in self.slowest[:NUM_SLOWEST])
            lines = ["slowest tests:", *tests]
        named = {"passed earlier": self.earlier, "failed": self.failed, "not begun": self.left}
        lines += [f"{what}: {', '.join(sorted(jobs))}" for what, jobs in named.items() if jobs]
        outcome = "not all passed" if self.failed or self.left else "all passed"
        earlier = f", {len(self.earlier)} passed earlier" if self.earlier else ""
        return "\n".join([*lines, f"{self.num_run} run in {seconds:.0f} s{earlier}: {outcome}"])


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES names, or the numbers of all GPUs that the driver lists."""
    if given := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return given.split(",")
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    lines = [line for line in listed.stdout.splitlines() if line.startswith("GPU ")]
    return [str(index) for index in range(len(lines))]


def groups_of(gpus: list[str], size: int) -> list[str]:
    """Disjoint groups of so many GPUs; of fewer, one with all of them."""
    starts = range(0, len(gpus) - size + 1, size)
    return [",".join(gpus[i : i + size]) for i in starts] or [",".join(gpus)]


def num_cores() -> int:
    """That this process may use: of its affinity, and of its control group."""
    count = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):  # "max": no limit
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        count = min(count, max(1, int(quota) // int(period)))
    return count


def compile_kernels() -> None:
    """All of them, before tests wait for one after the other."""
    status = subprocess.call([sys.executable, "-m", "tests.compile_all"], cwd=ROOT)
    if status:
        raise SystemExit("a kernel does not compile")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--match", default="", metavar="WORDS")
    parser.add_argument("--limit-sec", type=float, default=900.0)
    parser.add_argument("--within-sec", type=float, default=float("inf"))
    parser.add_argument("--keep", type=Path, metavar="FILE")
    parser.add_argument("--logs", type=Path, metavar="FOLDER")
    args, options = parser.parse_known_args(argv)
    gpus = visible_gpus()
    if not gpus:
        raise SystemExit("there is no NVIDIA GPU")
    begin = time.monotonic()
    compile_kernels()
    kept = Kept(args.keep, options)
    runner = Runner(options, args.limit_sec, kept, args.within_sec, args.logs)
    for jobs, size in zip(jobs_of(args.match.split(",")), (1, 2, len(gpus)), strict=True):
        runner.spread(jobs, groups_of(gpus, size))
    print(runner.summary(time.monotonic() - begin))
    sys.exit(bool(runner.failed or runner.left))


if __name__ == "__main__":
    main()
