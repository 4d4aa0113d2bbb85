"""Compile all shipped kernels that the cache lacks, on all cores: python -m tests.compile_all

A test that needs a kernel would wait for it, while other cores have nothing to do.
"""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import time

from cometrt.kernels import compiler
from tests.gpu import num_cores
from tests.machine_code import Build, builds


def compile_build(build: Build) -> None:
    file, defines = build
    compiler.compile_cubin(compiler.kernels_folder() / file, defines)


def main() -> None:
    begin, wanted = time.monotonic(), builds()
    wanted.sort(key=lambda build: "wgrad" not in build[0])  # these take longest
    workers, forks = min(num_cores(), len(wanted)), multiprocessing.get_context("fork")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=forks) as pool:
        for _ in pool.map(compile_build, wanted):
            pass
    print(f"{len(wanted)} kernels are compiled, after {time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
    main()
