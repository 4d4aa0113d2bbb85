"""README and guide: their code runs, their commands exist, and the README stays short."""

import ast
import functools
import importlib.util
import re
import shlex
import subprocess
import sys
import tomllib

import pytest

from tests.blocks import blocks_of, pages, run_page
from tests.launch import ROOT, environment

BLOCKS = [block for page in pages() for block in blocks_of(page)]
PROGRAMS = sorted({block.page for block in BLOCKS if block.language == "python"})
SHELL = [block for block in BLOCKS if block.language == "sh"]
NEEDS = ("mpi4py", "jax", "safetensors", "matplotlib")
# Commands that are parsed alone: of the shell, of the system, or of installed tools.
OTHERS = (
    "cd . export echo nvidia-cuda-mps-control git twine pre-commit pytest ruff mypy clang-format"
).split()
STARTED = ("python", "python3", "cometrt")  # on ranks
QUICK = ("memory", "bench", "trace")  # commands of cometrt that run here, where a page has them


def at(block):
    return f"{block.page}:{block.line}"


def test_every_block_says_what_it_is():
    assert len(BLOCKS) > 30
    for block in BLOCKS:
        # python runs, sh is checked, text is no code: a drawing, or what a command prints.
        assert block.language in ("python", "sh", "text"), at(block)
        if block.language == "python":
            ast.parse(block.text, at(block))
    for page in pages():
        fences = re.findall(r"^\s*```", (ROOT / page).read_text(), re.MULTILINE)
        assert len(fences) == 2 * len(blocks_of(page)), f"{page}: a fence that is not found"


def uses(page, *names):
    text = "".join(block.text for block in blocks_of(page) if block.language == "python")
    return [name for name in names if re.search(rf"^(import|from) {name}\b", text, re.MULTILINE)]


@pytest.mark.parametrize("page", PROGRAMS)
def test_code_of_a_page_runs_from_top_to_bottom(page, tmp_path):
    for name in uses(page, *NEEDS):
        pytest.importorskip(name)
    run_page(page, tmp_path, "host")


@pytest.mark.parametrize(
    "page", [page for page in PROGRAMS if uses(page, "mpi4py") and not uses(page, "jax")]
)
def test_code_of_a_page_runs_on_two_ranks(page, tmp_path):
    pytest.importorskip("mpi4py")
    run_page(page, tmp_path, "host", ranks=2)


# ---- commands ------------------------------------------------------------------------------------


def commands_of(block):
    """The words of each command, without assignments of variables and what starts it on ranks."""
    for line in block.text.splitlines():
        words = shlex.split(line, comments=True)
        while words:
            end = next((i for i, word in enumerate(words) if word in ("|", "&&")), len(words))
            command, words = words[:end], words[end + 1 :]
            while command and re.fullmatch(r"[A-Z][A-Z0-9_]*=.*", command[0]):
                del command[0]
            if command[:1] in (["mpirun"], ["srun"]):
                del command[: next(i for i, word in enumerate(command) if word in STARTED)]
            if command[:1] in (["python"], ["python3"]) and command[1:3] == ["-m", "mpi4py"]:
                del command[1:3]
            if command:
                yield command


@functools.cache
def help_of(*command):
    result = subprocess.run(
        [*command, "--help"], capture_output=True, text=True, timeout=120, cwd=ROOT,
        env=environment() | {"COLUMNS": "200", "NO_COLOR": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def check_options(command, arguments):
    for word in arguments:
        if word.startswith("-"):
            option = word.split("=")[0]
            assert re.search(rf"(?<![\w-]){option}(?![\w-])", help_of(*command)), option


def check(words):
    """Raise an AssertionError for a command that this repository does not have."""
    name, *rest = words
    if name == "cometrt":
        command = [sys.executable, "-m", "cometrt", *(rest[:1] if rest != ["--help"] else [])]
        assert help_of(*command)
        check_options(command, rest[1:])
    elif name in ("python", "python3") and rest[0] == "-m":
        module = rest[1]
        if module == "cometrt":
            check(["cometrt", *rest[2:]])
        elif module.startswith(("benchmarks.", "tests.")):
            assert (ROOT / f"{module.replace('.', '/')}.py").exists(), module
        else:
            assert importlib.util.find_spec(module), module
    elif name in ("python", "python3"):
        assert (ROOT / rest[0]).exists(), rest[0]
        check_options([sys.executable, rest[0]], rest[1:])
    elif name == "pip":
        known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        for extras in re.findall(r"\[([\w,]+)\]", " ".join(rest)):
            assert set(extras.split(",")) <= set(known["optional-dependencies"]), extras
    elif name == "make":
        makefile = (ROOT / "Makefile").read_text()
        for target in (word for word in rest if "=" not in word):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    else:
        assert name in OTHERS, name


@pytest.mark.parametrize("block", SHELL, ids=at)
def test_commands_exist_and_have_their_options(block):
    pytest.importorskip("typer")
    parsed = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True)
    assert parsed.returncode == 0, parsed.stderr
    for words in commands_of(block):
        if words[0].endswith(".py") or "train_lm" in " ".join(words):
            pytest.importorskip("optax")
        check(words)


WRONG = [
    "cometrt demo --no-such-option",
    "cometrt none",
    "make no-such-target",
    "python examples/none.py",
    "python examples/serve.py --no-such-option",
    "python -m benchmarks.none",
    "pip install '.[none]'",
    "rm x",
]


@pytest.mark.parametrize("command", WRONG)
def test_the_check_of_commands_finds_what_is_wrong(command):
    pytest.importorskip("typer")
    with pytest.raises(AssertionError):
        check(shlex.split(command))


RUN = sorted(
    {
        shlex.join(words)
        for block in SHELL
        for words in commands_of(block)
        if words[0] == "cometrt" and words[1] in QUICK and "--help" not in words
        # those of full size are for GPUs
        if words[1] == "memory" or {"--scale", "--rounds"} & set(words)
    }
)


@pytest.mark.parametrize("command", RUN)
def test_quick_commands_run(command, tmp_path):
    pytest.importorskip("typer")
    result = subprocess.run(
        [sys.executable, "-m", *shlex.split(command)], capture_output=True, text=True,
        timeout=240, cwd=tmp_path, env=environment() | {"CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr


def test_commands_in_running_text_exist():
    makefile = (ROOT / "Makefile").read_text()
    for page in pages():
        for target in re.findall(r"`make ([a-z-]+)", (ROOT / page).read_text()):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), (page, target)


# ---- the rest ------------------------------------------------------------------------------------


def test_readme_is_short():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    assert len(re.findall(r"^!\[", text, re.MULTILINE)) == 1  # a picture
    assert len(re.findall(r"^\|(?:-+\|)+$", text, re.MULTILINE)) == 1  # one table
    first = next(block for block in blocks_of("README.md") if block.language == "python")
    lines = [line for line in first.text.splitlines() if line.split("#")[0].strip()]
    assert len(lines) <= 12


def test_links_between_pages_and_to_files():
    for page in pages():
        text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(), flags=re.DOTALL | re.MULTILINE)
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
            if not target.startswith("http"):
                assert (ROOT / page).parent.joinpath(target).exists(), (page, target)


def test_every_example_is_run_by_a_test_that_needs_no_gpu():
    tests = "".join(path.read_text() for path in (ROOT / "tests" / "host").glob("test_*.py"))
    scripts = [path for path in (ROOT / "examples").glob("*.py") if path.name != "common.py"]
    assert len(scripts) > 5
    for path in scripts:
        assert f'"examples/{path.name}"' in tests, path.name  # what a test starts
        assert path.name in "".join((ROOT / page).read_text() for page in pages()), path.name
