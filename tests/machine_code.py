"""The machine code of all kernels, here and in another commit: pure refactoring changes none.

    make machine-code BASE=<commit>

RENAMED says which file or kernel of an older tree is which of this one, where names have changed.
"""

from __future__ import annotations

import concurrent.futures
import io
import os
import struct
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from cometrt.activations import ACTIVATIONS
from cometrt.kernels import compiler

ROOT = Path(__file__).resolve().parent.parent

# Macros of what is shipped, where a file is compiled in more ways than one.
ACTIVATED = [(("ACTIVATION", a), ("WRITE_Z", z)) for a in range(len(ACTIVATIONS)) for z in (0, 1)]
TRACED = ("TRACE", 1)
BUILDS = {
    "gemm/grouped_gemm.cu": [(("ACTIVATION", -1), ("WRITE_Z", 0)), *ACTIVATED],
    "gemm/grouped_down_dgrad.cu": [(("ACTIVATION", a),) for a in range(len(ACTIVATIONS))],
    "fused/dispatch_gemm.cu": ACTIVATED + [(*defines, TRACED) for defines in ACTIVATED],
    "fused/gemm_combine.cu": [(), (TRACED,)],
}
RENAMED: dict[str, str] = {
    "gemm/grouped_gemm.cu": "gemm/forward.cu",
    "fused/dispatch_gemm.cu": "fused/layer0.cu",
    "fused/gemm_combine.cu": "fused/layer1.cu",
    "scheduler/tile_order.cu": "schedule/turns.cu",
    "protocol/publish.cu": "exchange/publish.cu",
    "protocol/start_barrier.cu": "exchange/gate.cu",
    "sequential/rows.cu": "exchange/rows.cu",
    "sequential/activation.cu": "exchange/activation.cu",
    "grouped_gemm": "gemm",
    "dispatch_gemm": "layer0",
    "gemm_combine": "layer1",
    "tile_order": "turns",
    "start_barrier": "gate",
}

Build = tuple[str, tuple[tuple[str, int], ...]]  # a file of kernels_cu, its macros


def builds() -> list[Build]:
    """All that is shipped."""
    folder = compiler.kernels_folder()
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.cu"))
    return [(file, defines) for file in files for defines in BUILDS.get(file, [()])]


def machine_code(cubin: Path) -> dict[str, bytes]:
    """The sections of an ELF file that hold kernels, by the kernel's name."""
    data = cubin.read_bytes()
    (start,) = struct.unpack_from("<Q", data, 0x28)
    count, names_at = struct.unpack_from("<HH", data, 0x3C)
    headers = [struct.unpack_from("<IIQQQQ", data, start + 64 * i) for i in range(count)]
    sections = {}
    for name, _, _, _, offset, size in headers:
        begin = headers[names_at][4] + name
        text = data[begin : data.index(b"\0", begin)].decode()
        if text.startswith(".text."):
            sections[text.removeprefix(".text.")] = data[offset : offset + size]
    return sections


def compiled(folder: Path, file: str, defines: tuple[tuple[str, int], ...]) -> dict[str, bytes]:
    """The machine code of a file in that copy of kernels_cu."""
    compiler.kernels_folder = lambda: folder
    return machine_code(compiler.compile_cubin(folder / file, defines).path)


def compare(here: Path, base: Path, build: Build) -> list[str]:
    """What differs, a line each."""
    file, defines = build
    other = file if (base / file).exists() else RENAMED.get(file, file)
    if not (base / other).exists():
        return [f"{file}: not in the other tree"]
    ours, theirs = compiled(here, file, defines), compiled(base, other, defines)
    theirs = {name: theirs.get(name, theirs.get(RENAMED.get(name, ""))) for name in ours}
    what = f"{file} {' '.join(f'{name}={value}' for name, value in defines)}"
    return [
        f"{what}: {name} differs ({len(theirs[name] or b'') // 16} instructions, now "
        f"{len(code) // 16})"
        for name, code in ours.items()
        if code != theirs[name]
    ]


def main() -> int:
    commit = sys.argv[1]
    archive = subprocess.run(
        ["git", "archive", commit, "kernels_cu"], cwd=ROOT, capture_output=True, check=True
    ).stdout
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(archive)) as files:
            files.extractall(folder, filter="data")
        here, base = compiler.kernels_folder(), Path(folder, "kernels_cu")
        everything = builds()
        with concurrent.futures.ProcessPoolExecutor(os.cpu_count()) as pool:
            jobs = [pool.submit(compare, here, base, build) for build in everything]
            lines = [line for job in jobs for line in job.result()]
    print(*lines, sep="\n")
    print(f"{len(everything)} builds compared with {commit}: {len(lines)} differ")
    return bool(lines)


if __name__ == "__main__":
    sys.exit(main())
