"""How kernels_cu is built: which folder includes which, and what may stand in which file."""

import graphlib
import re

import pytest

from cometrt.kernels.compiler import kernels_folder
from tests.machine_code import BUILDS, LATE, LINKED, builds, ptx_of

FOLDER = kernels_folder()
# A folder of kernels_cu -> the folders that it includes, all of which stand above it here.
# kernels_cu/README.md has the same table.
FOLDERS: dict[str, set[str]] = {
    "hopper": set(),
    "common": {"hopper"},
    "scheduler": {"hopper", "common"},
    "gemm": {"hopper", "common", "scheduler"},
    "protocol": {"hopper", "common"},
    "plan": {"hopper", "common", "scheduler", "protocol"},
    "sequential": {"hopper", "common", "scheduler", "protocol", "plan"},
    "fused": {"hopper", "common", "scheduler", "gemm", "protocol", "plan"},
    "nodes": {"common", "protocol"},
    "router": {"hopper"},
}
MAX_LINES = 350
EMULATED_LINK = "protocol/emulated_link.cuh"
LINK_ATOMICS = ("red.relaxed.gpu.global.max.u64", "atom.relaxed.gpu.global.add.u64")


def sources() -> dict[str, str]:
    """Each source file of kernels_cu without its comments, by its path there."""
    return {
        str(path.relative_to(FOLDER)): re.sub(r"//.*", "", path.read_text())
        for path in sorted(FOLDER.rglob("*.cu*"))
    }


def includes() -> dict[str, set[str]]:
    """The files of kernels_cu that each file includes."""
    return {file: set(re.findall(r'#include "(.+?)"', text)) for file, text in sources().items()}


def all_includes(file: str) -> set[str]:
    """The files that a file includes, also through others."""
    graph, found, left = includes(), set(), {file}
    while left:
        new = graph[left.pop()] - found
        found |= new
        left |= new
    return found


def files_with(pattern: str) -> set[str]:
    return {file for file, text in sources().items() if re.search(pattern, text)}


def test_files_include_each_other_without_a_cycle():
    graph = includes()
    assert set().union(*graph.values()) <= set(graph)
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


def test_folders_include_each_other_one_way():
    found: dict[str, set[str]] = {folder: set() for folder in FOLDERS}
    for file, included in includes().items():
        folder = file.split("/")[0]
        found[folder] |= {other.split("/")[0] for other in included} - {folder}
    assert found == FOLDERS
    names = list(FOLDERS)
    for index, folder in enumerate(names):
        assert FOLDERS[folder] <= set(names[:index]), folder


def test_the_readme_has_the_same_folders_and_includes():
    rows = re.findall(r"^\| `(\w+)/` \|.*\| (.*) \|$", (FOLDER / "README.md").read_text(), re.M)
    written = {folder: set(re.findall(r"\w+", cell)) for folder, cell in rows}
    assert list(written.items()) == list(FOLDERS.items())


def test_only_peers_cuh_addresses_other_ranks_memory():
    # World's arrays of addresses, by rank. World::own() is this rank's.
    assert files_with(r"\b(data|flags|routing)\[(?!kMaxRanks|2\]\[kMaxRanks)") == {
        "protocol/peers.cuh"
    }
    text = sources()["protocol/control_block.cuh"]
    assert re.findall(r"\bcontrol\[.*", text) == [
        "control[kMaxRanks];",
        "control[rank]; }",
    ]
    assert "ControlBlock& own() const { return *control[rank]; }" in text
    assert files_with(r"\bcontrol\[") == {"protocol/control_block.cuh", "protocol/peers.cuh"}


def test_only_peers_cuh_synchronises_with_other_ranks_and_the_host():
    # System scope in PTX stands in hopper/memory.cuh, in helpers whose names end in _sys.
    assert files_with(r"\.sys\b") == {"hopper/memory.cuh"}
    helpers = re.findall(r"inline \w+ (\w+_sys)\(", sources()["hopper/memory.cuh"])
    assert len(helpers) == sources()["hopper/memory.cuh"].count(".sys")
    assert files_with(r"_sys\(") == {"hopper/memory.cuh", "protocol/peers.cuh"}
    assert files_with(r"__threadfence_system|atomic\w+_system") == {"protocol/peers.cuh"}


def test_assembly_stands_only_in_hopper():
    assert {file.split("/")[0] for file in files_with(r"\basm\b")} == {"hopper"}


def test_files_are_short():
    for path in FOLDER.rglob("*.cu*"):
        assert len(path.read_text().splitlines()) <= MAX_LINES, path


def test_every_file_that_emulates_the_link_is_built_with_it():
    built = {file for file, defines in builds() if LINKED in defines}
    assert built == {
        file for file in includes() if file.endswith(".cu") and EMULATED_LINK in all_includes(file)
    }
    for file in built:
        of_one_node = {defines for defines in BUILDS[file] if LATE not in defines}
        without = {defines for defines in of_one_node if LINKED not in defines}
        assert {(*defines, LINKED) for defines in without} == of_one_node - without


@pytest.mark.parametrize("file", sorted({file for file, defines in builds() if LINKED in defines}))
def test_production_builds_contain_no_link_emulation(file):
    pytest.importorskip("cuda.bindings", reason="needs NVRTC")
    production, emulated = ptx_of(file), ptx_of(file, (LINKED,))
    for instruction in LINK_ATOMICS:
        assert instruction not in production
        assert instruction in emulated


def test_a_second_gemm_begins_behind_the_loads_of_the_first():
    """Before, its waiting CTAs would take SMs that slices leave to NCCL."""
    for name in ("dispatch_gemm", "dispatch_down_dgrad"):
        text = (kernels_folder() / f"fused/{name}.cu").read_text()
        assert text.count("let_next_kernel_begin();") == 1
        assert text.index("produce(") < text.index("let_next_kernel_begin();")


def test_kernels_that_begin_early_wait_before_all_else():
    """A kernel of a file with `begins_early` touches global memory behind its wait alone."""
    harmless = ("extern __shared__", "__shared__", "Memory& ", "CombineMemory& ", "Roles roles")
    harmless += ("const UpDgradWgradOperands",)
    waits, found = ("wait_for_previous_kernel();", "run_cta("), 0
    body = (kernels_folder() / "gemm/kernel_body.cuh").read_text()
    assert body.count(waits[0]) == 1
    assert body.index(waits[0]) < body.index("cluster_barrier();") < body.index("roles.load(")
    for path in kernels_folder().rglob("*.cu"):
        text = path.read_text()
        if "begins_early = 1" not in text:
            assert waits[0] not in text, path
            continue
        for kernel in re.split(r'extern "C" __global__', text)[1:]:
            begin = kernel.index(") {\n") + 4
            statements = [
                " ".join(s.split()) for s in kernel[begin : kernel.index("\n}")].split(";")
            ]
            first = next(s for s in statements if not s.startswith(harmless))
            assert f"{first};".startswith(waits), (path, first)
            found += 1
    assert found == 15
