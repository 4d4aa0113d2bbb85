"""All that several GPUs of one host are to show, in one run: the tests on peers, what the link
carries, the models' layers, and whether the digital twin had told as much.

python benchmarks/multi_gpu.py --out DIR [--seconds 480] [--fake 4] [--parts link,tests,...]

Each part is a process of its own with a time limit: one that hangs costs its own results only.
DIR gets the parts' JSON files, which are written as they go, and what they printed. --fake: that
many ranks on one GPU, to try the script there.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cupy as cp

from benchmarks import peers
from benchmarks.files import read, write
from benchmarks.link import link
from cometrt.activations import ACTIVATIONS
from cometrt.kernels.compiler import compile_cubin, kernels_folder
from cometrt.world.link import LINKS

ROOT = Path(__file__).resolve().parents[1]
# In the order in which they run: seconds that each may take.
LIMITS = {"link": 60, "layers": 110, "tests": 170, "twin": 90, "fewer": 50}
LAST_WORDS = 15  # lines of what a part that failed has printed
AS_IT_IS = 0.10  # a twin that is as far off as that, or less
GRACE_SEC = 8  # between asking a part to end and killing it


def compile_all() -> None:
    """What the parts will load, all at once; each would compile it again for each rank."""
    swiglu, none = list(ACTIVATIONS).index("swiglu"), -1
    jobs: list[tuple[Path, tuple[tuple[str, int], ...]]] = []
    for path in sorted(kernels_folder().rglob("*.cu")):
        kinds = {"layer0.cu": [swiglu], "forward.cu": [swiglu, none]}.get(path.name)
        if kinds is None:
            jobs.append((path, ()))
            continue
        variants = [(kind, z) for kind in kinds for z in (0, 1) if kind != none or not z]
        jobs += [(path, (("ACTIVATION", kind), ("WRITE_Z", z))) for kind, z in variants]
    jobs += [(ROOT / "benchmarks" / name, ()) for name in ("link/link.cu", "nccl/rows.cu")]
    workers = min(len(jobs), os.cpu_count() or 1)
    with concurrent.futures.ProcessPoolExecutor(workers) as pool:
        list(pool.map(compile_cubin, *zip(*jobs, strict=True)))


class Run:
    """The parts of one run, and the time that is left for them."""

    def __init__(self, out: Path, seconds: float, ranks: int, fake: bool) -> None:
        self.out, self.ranks, self.fake = out, ranks, fake
        self._end = time.monotonic() + seconds
        self.parts: dict[str, dict[str, Any]] = {}

    def file(self, part: str) -> Path:
        return self.out / f"{part}.json"

    def part(self, name: str, *command: str, **environment: str) -> None:
        """Run ``python command...`` until it ends or its time is over."""
        limit = min(LIMITS[name], self._end - time.monotonic() - GRACE_SEC)
        if limit < 5:
            self._note(name, "not begun: no time left", 0.0)
            return
        print(f"==== {name}: up to {limit:.0f} s", flush=True)
        begin, log = time.monotonic(), self.out / f"{name}.log"
        path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        with log.open("w") as output:
            process = subprocess.Popen(
                [sys.executable, *command],
                cwd=ROOT,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(path)} | environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                code = process.wait(limit)
                outcome = "ended" if code == 0 else f"failed with {code}"
            except subprocess.TimeoutExpired:
                outcome = f"stopped after {limit:.0f} s"
                end_group(process)
        if outcome != "ended":
            print("\n".join(log.read_text().splitlines()[-LAST_WORDS:]))
        self._note(name, outcome, time.monotonic() - begin)

    def _note(self, name: str, outcome: str, seconds: float) -> None:
        self.parts[name] = {"outcome": outcome, "seconds": round(seconds, 1)}
        print(f"==== {name}: {outcome}, {seconds:.0f} s", flush=True)
        write(self.file("parts"), self.parts)

    # ---- the parts --------------------------------------------------------------------------

    def link(self) -> None:
        command = ["benchmarks/link/link.py", "--ranks", str(self.ranks)]
        self.part("link", *command, "--out", str(self.file("link")))

    def tests(self) -> None:
        fake = {"COMETRT_TEST_RANKS": str(self.ranks)} if self.fake else {}
        options = ["-v", "--gpu", "--maxfail=8", "-p", "no:cacheprovider", "-o", "timeout=130"]
        self.part("tests", "-m", "pytest", "tests/device/test_peers.py", *options, **fake)

    def layers(self) -> None:
        self._peers("layers", self.ranks)

    def fewer(self) -> None:
        self._peers("fewer", self.ranks // 2)

    def twin(self) -> None:
        self._peers("twin", self.ranks, "--link", "--like", str(self.file("layers")))

    def _peers(self, name: str, ranks: int, *options: str) -> None:
        command = ["benchmarks/peers.py", "--ranks", str(ranks), "--gbps", f"{self.gbps():.0f}"]
        self.part(name, *command, *options, "--out", str(self.file(name)))

    def gbps(self) -> float:
        """Of the link, each way while both are busy: the best way to use it that was measured."""
        rates = read(self.file("link")).get("gbps", {})
        both = [rate for name, rate in rates.items() if name.endswith("both ways")]
        best = [max(r.values()) if isinstance(r, dict) else r for r in both if r]
        return LINKS["h100"] if self.fake or not best else max(best)


def end_group(process: subprocess.Popen[Any]) -> None:
    """mpirun ends its ranks when it is asked to; what does not listen is killed."""
    for number, patience in ((signal.SIGTERM, GRACE_SEC), (signal.SIGKILL, 5)):
        try:
            os.killpg(process.pid, number)
            process.wait(patience)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def show_tests(log: Path) -> None:
    """From what pytest has printed, so that tests which ended before a part was stopped count."""
    text = log.read_text() if log.exists() else ""
    words = ("PASSED", "FAILED", "ERROR", "SKIPPED")
    count = {word: len(re.findall(rf"^tests/\S.* {word}", text, re.MULTILINE)) for word in words}
    print("tests: " + ", ".join(f"{number} {word.lower()}" for word, number in count.items()))
    for line in re.findall(r"^(?:FAILED|ERROR) tests/.*", text, re.MULTILINE):
        print(f"  {line[:300]}")


def show_twin(real: dict[str, Any], twin: dict[str, Any]) -> None:
    """Where the twin says something else than the GPUs."""
    for name, cell in real.items():
        modelled = twin.get(name, {})
        if "tflops" not in cell or "tflops" not in modelled:
            continue
        told = [f"{name:28s}"]
        for mode in ("fused", "sequential", "gemms"):
            found, expected = cell["tflops"][mode], modelled["tflops"][mode]
            mark = "" if abs(expected / found - 1) <= AS_IT_IS else " (!)"
            told.append(f"{mode} {found:.0f}, twin {expected:.0f}{mark}")
        speedups = (cell["speedup_over_sequential"], modelled["speedup_over_sequential"])
        told.append("over sequential {:.2f}, twin {:.2f}".format(*speedups))
        print("  ".join(told))


def show(run: Run) -> None:
    print("\n" + ", ".join(f"{name} {part['outcome']}" for name, part in run.parts.items()))
    show_tests(run.out / "tests.log")
    found = {name: read(run.file(name)) for name in ("link", "layers", "fewer", "twin")}
    if found["link"]:
        print(f"\nlink between {run.ranks} ranks, shared GPU: {found['link'].get('shared_gpu')}")
        link.show(found["link"])
    for name in ("layers", "fewer", "twin"):
        cells = found[name].get("cells", {})
        print(f"\n{name}, link of {found[name].get('gbps', 0):.0f} GB/s\n{peers.TITLE}")
        for cell, figures in cells.items():
            print(peers.line(cell, figures))
    print(f"\nthe twin beside it; (!): off by more than {AS_IT_IS:.0%}")
    show_twin(found["layers"].get("cells", {}), found["twin"].get("cells", {}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=480)
    parser.add_argument("--fake", type=int, metavar="RANKS")
    parser.add_argument("--parts", default=",".join(LIMITS))
    args = parser.parse_args()
    if unknown := set(args.parts.split(",")) - set(LIMITS):
        parser.error(f"--parts must be of {', '.join(LIMITS)} (got {', '.join(unknown)})")
    ranks = args.fake or cp.cuda.runtime.getDeviceCount()
    if ranks < 2:
        parser.error(f"needs two GPUs, or --fake (got {ranks})")
    args.out.mkdir(parents=True, exist_ok=True)
    run = Run(args.out.resolve(), args.seconds, ranks, args.fake is not None)
    begin = time.monotonic()
    compile_all()
    print(f"compiled, {time.monotonic() - begin:.0f} s", flush=True)
    for part in LIMITS:
        if part in args.parts.split(","):
            getattr(run, part)()
    show(run)


if __name__ == "__main__":
    main()
