"""The machine code of all kernels, here and in another commit: pure refactoring changes none.

    make machine-code BASE=<commit>

RENAMED maps a file or kernel of this tree to its name in an older one. An entry applies only where
the older tree lacks the new name.
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
from cometrt.kernels.constants import MACROS, SMALL_BLOCK_N
from cometrt.router.cuda import EXPERTS_PER_LANE

ROOT = Path(__file__).resolve().parent.parent

Defines = tuple[tuple[str, int], ...]  # macros of a build
Build = tuple[str, Defines]  # a file of kernels_cu, its macros


def _with_options(builds: list[Defines], *options: tuple[str, int]) -> list[Defines]:
    """Each build alone and with every combination of the options."""
    for option in options:
        builds = builds + [(*defines, option) for defines in builds]
    return builds


# Macros of what is shipped, where a file is compiled in more ways than one.
ACTIVATED: list[Defines] = [
    (("ACTIVATION", a), ("WRITE_Z", z)) for a in range(len(ACTIVATIONS)) for z in (0, 1)
]
TRACED, LINKED, NARROW = ("TRACE", 1), ("LINK", 1), ("N_TILE", SMALL_BLOCK_N)
LATE = ("LATE", 1)  # neither narrow nor linked
NARROW_OR_WIDE: list[Defines] = [(), (NARROW,)]
BUILDS: dict[str, list[Defines]] = {
    "gemm/grouped_gemm.cu": [(("ACTIVATION", -1), ("WRITE_Z", 0)), *ACTIVATED],
    "gemm/grouped_down_dgrad.cu": [(("ACTIVATION", a),) for a in range(len(ACTIVATIONS))],
    "fused/dispatch_gemm.cu": [
        *_with_options([of + n for n in NARROW_OR_WIDE for of in ACTIVATED], TRACED, LINKED),
        *_with_options([(*of, LATE) for of in ACTIVATED], TRACED),
    ],
    "fused/dispatch_down_dgrad.cu": [
        *_with_options([(("ACTIVATION", a),) for a in range(len(ACTIVATIONS))], TRACED, LINKED),
        *_with_options([(("ACTIVATION", a), LATE) for a in range(len(ACTIVATIONS))], TRACED),
    ],
    "fused/up_dgrad_combine_wgrad.cu": [
        *_with_options([()], TRACED, LINKED),
        *_with_options([(LATE,)], TRACED),
    ],
    "fused/gemm_combine.cu": [
        *_with_options(NARROW_OR_WIDE, TRACED, LINKED),
        *_with_options([(LATE,)], TRACED),
    ],
    "plan/plan.cu": _with_options([()], LINKED),
    "plan/plan_small.cu": _with_options([()], LINKED),
    "sequential/rows.cu": _with_options([()], LINKED),
    "router/router.cu": [(("EXPERTS_PER_LANE", n),) for n in EXPERTS_PER_LANE],
    "router/losses.cu": [(("EXPERTS_PER_LANE", n),) for n in EXPERTS_PER_LANE],
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


def ptx_of(file: str, defines: Defines = ()) -> str:
    """The PTX of a file of kernels_cu with those macros."""
    from cuda.bindings import nvrtc

    folder = compiler.kernels_folder()
    macros = (*((f"COMETRT_{name}", value) for name, value in MACROS.items()), *defines)
    options = ["-arch=compute_90a", "-std=c++17", "-default-device"]
    options += [f"-I{path}" for path in (folder, compiler.cuda_headers())]
    options += [f"-D{name}={value}" for name, value in macros]
    text = (folder / file).read_bytes()
    _, program = nvrtc.nvrtcCreateProgram(text, Path(file).name.encode(), 0, [], [])
    try:
        (error,) = nvrtc.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])
        assert int(error) == 0, f"{file} does not compile"
        _, size = nvrtc.nvrtcGetPTXSize(program)
        ptx = b" " * size
        nvrtc.nvrtcGetPTX(program, ptx)
        return ptx.decode().rstrip("\0")
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def compiled(folder: Path, file: str, defines: Defines) -> dict[str, bytes]:
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
    what = f"{file} {' '.join(f'{name}={value}' for name, value in defines)}"
    old = {name: name if name in theirs else RENAMED.get(name, name) for name in ours}
    lines = [f"{what}: {name} is missing" for name in theirs.keys() - set(old.values())]
    for name, code in ours.items():
        other_code = theirs.get(old[name], b"")
        if code != other_code:
            counts = f"{len(other_code) // 16} instructions, now {len(code) // 16}"
            lines.append(f"{what}: {name} differs ({counts})")
    return lines


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
