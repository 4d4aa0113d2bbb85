"""Imports within cometrt go one way: a module imports only from its own layer and those below.

Every import counts, also one inside a function or under TYPE_CHECKING, unless it is listed in
ALLOWED with its reason.
"""

import ast
import graphlib
from pathlib import Path

import pytest

import cometrt
from tests.launch import ROOT

MAX_LINES = 350  # of a file; kernels have as many

# Low to high. A package stands for its modules, unless a module is listed by itself.
LAYERS = (
    {"errors", "activations", "types", "closing", "kernels.constants"},
    {"specs"},
    {"node_specs"},
    {"models", "reference", "weights", "arrays", "stats"},
    {"plan"},
    {"world"},
    {"kernels", "trace", "heap", "buffers", "residuals", "plan_ahead", "legality"},
    {"arguments", "executor", "call_scope", "router"},
    {"host", "cuda"},
    {"nodes"},
    {"memory", "tuner"},
    {"agreement", "layer_life"},
    {"layer"},
    {"interop"},
    {""},  # cometrt/__init__.py
    {"bench"},
    {"cli"},
    {"__main__"},
)
ALLOWED = {
    ("specs", "memory"): "MoESpec.memory is public, and computed from all that a layer allocates",
    ("specs", "plan"): "the type of an argument of MoESpec.memory",
}
# Within world/ helpers name the type of the World that calls them.
TYPES_ONLY = {("world.nccl", "world.nodes"),
              ("world.collectives", "world.base"), ("world.device", "world.base"),
              ("world.regions", "world.base"), ("world.reset", "world.base"),
              ("world.peer_status", "world.base"), ("world.wait", "world.base")}  # fmt: skip

Imports = dict[str, set[str]]  # module -> modules that it imports, both below cometrt


def read_imports() -> Imports:
    """From the sources: the graph of modules, named without the leading "cometrt."."""
    folder = Path(cometrt.__file__).parent
    names = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        names[".".join(part for part in parts if part != "__init__")] = path
    return {name: imports_of(path.read_text(), set(names)) for name, path in names.items()}


def imports_of(source: str, modules: set[str]) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            base = node.module or ""
            wanted = [f"{base}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            base, wanted = "", [alias.name for alias in node.names]
        else:
            continue
        for name in wanted:
            if name.split(".")[0] == "cometrt":
                own = name.removeprefix("cometrt").removeprefix(".")
                found.add(own if own in modules else base.removeprefix("cometrt")[1:])
    return found


def layer_of(module: str) -> int:
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        for index, layer in enumerate(LAYERS):
            if ".".join(parts[:length]) in layer:
                return index
    raise AssertionError(f"cometrt.{module} must be in LAYERS")


def upward(imports: Imports) -> list[tuple[str, str]]:
    return [
        (module, name)
        for module, names in imports.items()
        for name in names
        if layer_of(name) > layer_of(module) and (module, name) not in ALLOWED
    ]


def without(imports: Imports, allowed) -> Imports:
    return {
        module: {name for name in names if (module, name) not in allowed}
        for module, names in imports.items()
    }


def test_no_import_goes_upwards():
    assert upward(read_imports()) == []


def test_no_modules_import_each_other():
    graph = without(read_imports(), ALLOWED.keys() | TYPES_ONLY)
    graphlib.TopologicalSorter(graph).prepare()


def test_all_exceptions_are_needed():
    imports = read_imports()
    for module, name in ALLOWED.keys() | TYPES_ONLY:
        assert name in imports[module]


def test_the_check_sees_what_is_wrong():
    names = {"", "errors", "layer", "plan", "plan.config", "world.base"}
    lazy = "def f():\n    from cometrt.layer import MoELayer\nimport cometrt.errors, numpy"
    assert imports_of(lazy, names) == {"layer", "errors"}
    assert imports_of("from cometrt.plan import config, Plan", names) == {"plan", "plan.config"}
    assert imports_of("from cometrt import CometError", names) == {""}
    wrong = {"plan.config": {"layer", "errors"}, "layer": {"plan.config"}, "errors": set()}
    assert upward(wrong) == [("plan.config", "layer")]
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter(wrong).prepare()
    with pytest.raises(AssertionError, match=r"cometrt\.new must be in LAYERS"):
        layer_of("new")


PUBLIC = {"_asdict", "_replace", "_fields", "_field_defaults", "_exit"}  # of the standard library


@pytest.mark.parametrize("folder", ["tests", "benchmarks", "examples"])
def test_nothing_outside_reaches_into_private_fields(folder):
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Attribute) or not node.attr.startswith("_"):
                continue
            own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls", "torch")
            if own or node.attr.startswith("__") or node.attr in PUBLIC:
                continue
            raise AssertionError(f"{path}:{node.lineno}: {ast.unparse(node)}")


def test_no_file_is_long():
    folder = Path(cometrt.__file__).parent
    lines = {path: len(path.read_text().splitlines()) for path in folder.rglob("*.py")}
    assert len(lines) > 100
    assert {path.name: count for path, count in lines.items() if count > MAX_LINES} == {}
