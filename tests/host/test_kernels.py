"""Every shipped kernel compiles for sm_90a, without a GPU, spills or local memory."""

import re
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest

from cometrt import CometError
from cometrt.cuda.trace import KINDS
from cometrt.kernels import compiler
from cometrt.kernels.compiler import compile_cubin, kernels_folder
from cometrt.kernels.constants import MACROS, SMALL_BLOCK_N, TRACE_LANES
from cometrt.kernels.elf import constants
from cometrt.kernels.params import MIRRORS, trace_lane_dtype
from tests.launch import ROOT
from tests.machine_code import BUILDS, builds, machine_code

pytest.importorskip("cuda.bindings", reason="needs NVRTC")

BENCHMARKS = [
    (path, ()) for name in ("benchmarks", "cometrt/bench") for path in (ROOT / name).glob("*.cu")
]
SHIPPED = [(kernels_folder() / file, defines) for file, defines in builds()] + BENCHMARKS


def shipped() -> list:
    """All builds; of those with TRACE, LINK or LATE only one activation's, and none with both TRACE
    and LATE, but for --full."""
    found = []
    for path, defines in SHIPPED:
        macros = dict(defines)
        optional = {"TRACE", "LINK", "LATE"} & macros.keys() and macros.get("ACTIVATION", 0) > 0
        optional = optional or {"TRACE", "LATE"} <= macros.keys()
        name = path.name + "".join(f"-{value}" for _, value in defines)
        marks = pytest.mark.full if optional else ()
        found.append(pytest.param(path, defines, id=name, marks=marks))
    return found


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch, request):
    monkeypatch.setenv("COMETRT_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))


@pytest.mark.parametrize(("source", "defines"), shipped())
def test_kernels_compile_without_spills(source, defines):
    cubin = compile_cubin(source, defines)
    assert cubin.path.read_bytes().startswith(b"\x7fELF")
    assert cubin.resources
    for name, used in cubin.resources.items():
        # Late parts: what the warps that move rows keep around their waits.
        few = 32 if ("LATE", 1) in defines else 0
        assert used.spill_bytes <= few, name
        assert used.stack_bytes <= few, name
        assert 0 < used.registers <= 255, name
    # ptxas says so where it makes wgmma wait for each other, or ignores setmaxnreg.
    assert "C75" not in cubin.path.with_suffix(".txt").read_text()


def layout_of(struct: str, header: str, names: list[str], before: str = "") -> list[int]:
    """Offsets of the members and the size, as the compiler folds them into PTX."""
    from cuda.bindings import nvrtc

    values = [f"(u64)&((cometrt::{struct}*)0)->{name}" for name in names]
    values.append(f"sizeof(cometrt::{struct})")
    stores = "".join(f"out[{i}] = {value};" for i, value in enumerate(values))
    text = (
        f'{before}\n#include "{header}"\nusing u64 = unsigned long long;\n'
        f'extern "C" __global__ void layout(volatile u64* out) {{ {stores} }}'
    )
    options = ["-arch=compute_90a", "-std=c++17", f"-I{kernels_folder()}"]
    options.append(f"-I{compiler.cuda_headers()}")
    options += [f"-DCOMETRT_{name}={value}" for name, value in MACROS.items()]
    _, program = nvrtc.nvrtcCreateProgram(text.encode(), b"layout.cu", 0, [], [])
    (error,) = nvrtc.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])
    assert int(error) == 0
    _, size = nvrtc.nvrtcGetPTXSize(program)
    ptx = b" " * size
    nvrtc.nvrtcGetPTX(program, ptx)
    constants = dict(re.findall(r"mov\.[bu]64\s+(%rd\d+), (\d+);", ptx.decode()))
    stored = re.findall(
        r"st\.volatile\.global\.\w64\s+\[%rd\d+(?:\+(\d+))?\], (\S+);", ptx.decode()
    )
    found = {int(at or 0) // 8: int(constants.get(value, value)) for at, value in stored}
    return [found[i] for i in range(len(values))]


@pytest.mark.parametrize("struct", MIRRORS)
def test_structs_are_laid_out_as_their_mirrors(struct):
    header, mirror = MIRRORS[struct]
    expected = [mirror.fields[name][1] for name in mirror.names] + [mirror.itemsize]
    assert layout_of(struct, header, list(mirror.names)) == expected


def test_kernels_say_how_much_shared_memory_they_need():
    gemm, narrow = (
        layout_of("Shared", "gemm/tile.cuh", [], define)[0]
        for define in ("", f"#define N_TILE {SMALL_BLOCK_N}")
    )
    (dispatch,) = layout_of(
        "DispatchStages<cometrt::CopyShape<3, 4096>>", "fused/dispatch_warp.cuh", []
    )
    (dispatch_dy,) = layout_of(
        "DispatchStages<cometrt::CopyShape<6, 4096>>", "fused/dispatch_warp.cuh", []
    )
    (combine,) = layout_of("CombineStages", "fused/row_sums.cuh", [])
    down_dgrad, fused_down_dgrad = (
        layout_of(f"DownDgradShared<{stages}>", "gemm/down_dgrad_shared.cuh", [], define)[0]
        for stages, define in ((3, ""), (2, "#define GEMM_STAGES 3"))
    )
    (wgrad,) = layout_of("WgradShared", "gemm/wgrad_epilogue.cuh", [])
    plain = {("ACTIVATION", -1), ("ACTIVATION", 0), ("WRITE_Z", 0), ("N_TILE", SMALL_BLOCK_N)}
    num_sizes, two_widths = {}, ("fused/dispatch_gemm.cu", "fused/gemm_combine.cu")
    for file, wanted in (
        ("gemm/grouped_gemm.cu", gemm),
        ("gemm/grouped_dgrad.cu", gemm),
        ("gemm/grouped_down_dgrad.cu", down_dgrad),
        ("gemm/grouped_wgrad.cu", wgrad),
        ("fused/dispatch_gemm.cu", gemm + 2 * dispatch),
        ("fused/dispatch_gemm.cu", -(-narrow // 128) * 128 + 2 * dispatch),
        ("fused/gemm_combine.cu", gemm + 2 * combine),
        ("fused/gemm_combine.cu", -(-narrow // 128) * 128 + 2 * combine),
        ("fused/dispatch_down_dgrad.cu", -(-fused_down_dgrad // 128) * 128 + 2 * dispatch_dy),
        ("fused/up_dgrad_combine_wgrad.cu", gemm + 2 * combine),
    ):
        sizes = {
            constants(compile_cubin(kernels_folder() / file, macros).path)["shared_bytes"]
            for source, macros in builds()
            if source == file and set(dict(macros).items()) <= plain
        }
        assert wanted in sizes, file
        assert max(sizes) <= 227 * 1024, file
        num_sizes[file] = len(sizes)
    assert num_sizes == dict.fromkeys(num_sizes, 1) | dict.fromkeys(two_widths, 2)


def test_nothing_is_read_as_if_it_never_changed():
    # Peers write what kernels read, also while these run: a read-only load may find what was.
    for path in kernels_folder().rglob("*.cu*"):
        assert not re.search(r"__restrict__|__ldg|ld\.global\.nc", path.read_text()), path


def without_recorders(folder: Path) -> None:
    """Take out of a copy of kernels_cu what common/trace.cuh says may be left out."""
    for path in folder.rglob("*.cu*"):
        text = path.read_text()
        if path.name == "trace.cuh":
            text = re.sub(r"#if TRACE\n.*?#endif\n", "", text, flags=re.DOTALL)
        text = re.sub(r",\s+(Recorder )?recorder( = \{\})?(?=\))", "", text)
        lines = [line for line in text.splitlines() if "recorder" not in line.lower()]
        path.write_text("\n".join(lines) + "\n")


def instructions(code: bytes) -> list[int]:
    """The opcodes, in their order. Registers are left out: the compiler may number them in another
    way, though the sources differ by nothing that leaves code."""
    return [int.from_bytes(code[at : at + 2], "little") & 0xFFF for at in range(0, len(code), 16)]


@pytest.mark.parametrize(
    "name", ["dispatch_gemm", "gemm_combine", "dispatch_down_dgrad", "up_dgrad_combine_wgrad"]
)
def test_no_trace_is_the_code_of_sources_without_recorders(name, tmp_path, monkeypatch):
    defines = BUILDS[f"fused/{name}.cu"][0]
    here = kernels_folder() / "fused" / f"{name}.cu"
    off, on = (machine_code(compile_cubin(here, (*defines, ("TRACE", i))).path) for i in (0, 1))
    folder = tmp_path / "kernels_cu"
    shutil.copytree(kernels_folder(), folder)
    without_recorders(folder)
    monkeypatch.setattr(compiler, "kernels_folder", lambda: folder)
    stripped = machine_code(compile_cubin(folder / "fused" / here.name, defines).path)
    assert set(off) == {name}
    assert len(off[name]) > 10_000
    assert instructions(off[name]) == instructions(stripped[name])
    assert instructions(off[name]) != instructions(on[name])


def test_traces_are_read_as_they_are_written():
    text = (kernels_folder() / "common" / "trace.cuh").read_text()
    written = re.search(r"enum EventKind : u16 \{(.*?)\}", text, re.DOTALL).group(1)
    names = ["k" + f"{name} {flag}".title().translate({32: "", 95: ""}) for _, name, flag in KINDS]
    assert re.findall(r"\w+", written) == names
    (nbytes,) = layout_of("TraceLane[cometrt::kTraceLanes]", "common/trace.cuh", [])
    assert nbytes == TRACE_LANES * trace_lane_dtype.itemsize


def test_local_memory_is_reported(tmp_path):
    (tmp_path / "local.cu").write_text(
        'extern "C" __global__ void local(float* x, int* at) {\n'
        "  float a[64];\n"
        "  for (int i = 0; i < 64; ++i) a[i] = x[i * i] * x[3 * i];\n"
        "  __syncthreads();\n"
        "  for (int i = 0; i < 64; ++i) a[at[i]] += 1;\n"
        "  x[0] = a[at[threadIdx.x]];\n"
        "}\n"
    )
    assert compile_cubin(tmp_path / "local.cu").resources["local"].stack_bytes == 256


def test_an_error_carries_the_compilers_words(tmp_path):
    (tmp_path / "bad.cu").write_text("__global__ void f() { undefined_name; }")
    with pytest.raises(CometError, match=r"(?s)could not compile bad\.cu.*undefined_name"):
        compile_cubin(tmp_path / "bad.cu")


def test_the_cache_knows_sources_headers_macros_and_versions(tmp_path, monkeypatch):
    source = tmp_path / "k.cu"
    source.write_text('extern "C" __global__ void k(int* x) { *x = VALUE; }')
    compiled = []
    real = compiler.nvrtc_compile
    monkeypatch.setattr(
        compiler, "nvrtc_compile", lambda *args: compiled.append(args) or real(*args)
    )
    first = compile_cubin(source, (("VALUE", 1),))
    assert compile_cubin(source, (("VALUE", 1),)) == first
    assert len(compiled) == 1
    assert compile_cubin(source, (("VALUE", 2),)).path != first.path
    monkeypatch.setattr(compiler, "_sources_digest", lambda: "a header has changed")
    assert compile_cubin(source, (("VALUE", 1),)).path != first.path
    monkeypatch.undo()
    assert not [p for p in first.path.parent.iterdir() if p.suffix not in (".cubin", ".txt")]


def test_many_ranks_may_compile_at_once(tmp_path):
    source = tmp_path / "k.cu"
    source.write_text('extern "C" __global__ void k(int* x) { *x = 3; }')
    cubins = [None] * 6

    def compile_one(index):
        cubins[index] = compile_cubin(source)

    threads = [threading.Thread(target=compile_one, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({cubin.path for cubin in cubins}) == 1
    assert np.frombuffer(cubins[0].path.read_bytes()[:4], np.uint8)[1] == ord("E")
