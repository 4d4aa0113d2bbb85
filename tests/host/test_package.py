"""What is shipped: imports, the wheel in a clean environment, the scripts."""

import os
import re
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

import cometrt
from tests import dist
from tests.launch import ROOT, mpirun

ON_HOST = """
import numpy as np, cometrt
def fn(world):
    spec = cometrt.MoESpec(hidden=32, intermediate=32, num_experts=4, topk=2, max_tokens=8)
    rng = np.random.default_rng(world.rank)
    up = np.ones((2, 64, 32), spec.numpy_dtype)
    down = np.ones((2, 32, 32), spec.numpy_dtype)
    x = rng.normal(size=(8, 32)).astype(spec.numpy_dtype)
    ids, weights = cometrt.router.softmax_topk(rng.normal(size=(8, 4)), 2)
    y, saved = cometrt.MoELayer(world, spec).forward(x, ids, weights, up, down)
    return float(abs(y.astype(float)).sum())
assert min(cometrt.spawn(fn, 2)) > 0
"""

BLOCKED = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"mpi4py", "cupy", "cuda", "matplotlib", "jax", "torch"}:
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Block())
"""

NO_MPI = """
try:
    cometrt.connect(None, device="host")
except ValueError as error:
    assert "connect needs mpi4py" in str(error), error
else:
    raise AssertionError
"""


def run(python, *arguments, cwd):
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    result = subprocess.run(
        [python, *arguments], capture_output=True, text=True, cwd=cwd, env=env, timeout=250
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_works_without_mpi_cuda_and_matplotlib(tmp_path):
    (tmp_path / "blocked.py").write_text(BLOCKED + ON_HOST + NO_MPI)
    run(sys.executable, "blocked.py", cwd=tmp_path)


WITHOUT_RICH = """
import sys
sys.modules["rich"] = sys.modules["typer"] = None
from cometrt.cli import main
main(sys.argv[1:])
"""


@pytest.mark.parametrize("command", ["", *"doctor demo bench tune trace memory".split()])
def test_commands_without_their_extra_say_in_a_sentence_what_to_install(command, tmp_path):
    (tmp_path / "command.py").write_text(WITHOUT_RICH)
    found = subprocess.run(
        [sys.executable, "command.py", *command.split()],
        capture_output=True, text=True, cwd=tmp_path, timeout=60,
    )  # fmt: skip
    assert found.returncode == 1
    assert found.stdout == ""
    assert len(found.stderr.splitlines()) == 1
    assert "pip install 'cometrt[cli]'" in found.stderr


def test_import_creates_no_communicator_and_loads_nothing_optional(tmp_path):
    code = "import sys, cometrt; print(sorted({m.split('.')[0] for m in sys.modules}))"
    loaded = run(sys.executable, "-c", code, cwd=tmp_path)
    for name in ("mpi4py", "cupy", "cuda", "matplotlib", "jax", "torch"):
        assert f"'{name}'" not in loaded


def test_torch_appears_only_in_benchmarks():
    pattern = re.compile(r"^\s*(import|from)\s+torch\b", re.MULTILINE)
    for folder in ("cometrt", "tests", "examples"):
        for path in (ROOT / folder).rglob("*.py"):
            assert not pattern.search(path.read_text()), path


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "-o", str(folder), str(ROOT), cwd=folder)
    return {path.suffix: path for path in folder.iterdir()}


def test_installed_wheel_works_from_any_folder(distributions, tmp_path):
    # The wheel was built from the sdist, so the sdist is whole too.
    wheel = distributions[".whl"]
    assert distributions[".gz"].name.startswith(f"cometrt-{cometrt.__version__}")
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        f"cometrt/kernels_cu/{path.relative_to(ROOT / 'kernels_cu')}"
        for path in (ROOT / "kernels_cu").rglob("*")
        if path.suffix in (".cu", ".cuh", ".md")
    }
    assert expected
    assert expected <= names
    expected = {"cometrt/py.typed", "cometrt/tuner/defaults.json", "cometrt/bench/nccl.cu"}
    assert expected <= names
    assert not [name for name in names if name.startswith(("tests/", "examples/"))]

    venv.create(tmp_path / "clean", with_pip=True)
    python = str(tmp_path / "clean" / "bin" / "python")
    run(python, "-m", "pip", "install", "-q", str(wheel), cwd=tmp_path)
    code = ON_HOST + "print(cometrt.__file__, cometrt.__version__)"
    (tmp_path / "elsewhere").mkdir()
    where, version = run(python, "-c", code, cwd=tmp_path / "elsewhere").split()
    assert Path(where).is_relative_to(tmp_path / "clean")
    assert version == cometrt.__version__
    command = [str(tmp_path / "clean" / "bin" / "cometrt"), "doctor"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert found.returncode == 1
    assert "pip install 'cometrt[cli]'" in found.stderr


def test_a_wheel_works_beside_what_this_python_has(distributions, tmp_path, monkeypatch, capsys):
    """As `python -m tests.dist --gpu` tries it, but on the host."""
    pytest.importorskip("typer")
    pytest.importorskip("cuda.bindings", reason="needs the compile extra")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), "/of/another"]))
    assert dist.python_path(tmp_path).split(os.pathsep) == [str(tmp_path), "/of/another"]
    dist.try_in_place(distributions[".whl"], tmp_path, "host")
    said = capsys.readouterr().out
    python = ".".join(map(str, sys.version_info[:3]))
    assert f"cometrt {cometrt.__version__} works with Python {python} on host" in said


def test_the_package_of_the_sdist_is_that_of_the_wheel(distributions, tmp_path):
    sdist, wheel = distributions[".gz"], distributions[".whl"]
    assert dist.compare(sdist, wheel) == len(dist.package_of_wheel(wheel)) > 200
    other = tmp_path / wheel.name
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(other, "w") as new:
        for name in old.namelist():
            if name != "cometrt/errors.py":
                new.writestr(name, old.read(name) + b"#" * (name == "cometrt/specs.py"))
    with pytest.raises(SystemExit, match=r"differ in errors\.py, specs\.py$"):
        dist.compare(sdist, other)


def test_without_a_network_and_a_backend_a_wheel_must_be_given(tmp_path, monkeypatch):
    monkeypatch.setattr(dist, "has_backend", lambda: False)
    with pytest.raises(SystemExit, match="give --wheel"):
        dist.try_on_gpu(None, None, tmp_path)


def test_changelog_and_citation_name_this_version():
    versions = re.findall(r"^## (\S+), (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[0][0] == cometrt.__version__
    citation = (ROOT / "CITATION.cff").read_text()
    fields = dict(re.findall(r"^([a-z-]+): (\S.*)$", citation, re.MULTILINE))
    assert (fields["version"], fields["date-released"]) == versions[0]
    assert fields["license"] == "Apache-2.0"


# ---- the example scripts ------------------------------------------------------------------------


def script(ranks, *arguments, timeout_sec=240):
    result = mpirun(ranks, "-m", "mpi4py", *arguments, timeout_sec=timeout_sec)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (4, "--model mixtral-8x7b --scale 64 --skew 1"),
        (4, "--model qwen2-moe --tp 2 --order columns --save z"),
        (2, "--model phi-3.5-moe --scale 64 --dtype float32 --mode sequential"),
        (1, "--model deepseek-v3 --scale 64 --tokens 40"),
    ],
)
def test_layer_example(ranks, options, tmp_path):
    trace = tmp_path / "trace.json"
    printed = script(ranks, "examples/moe_layer.py", *options.split(), "--trace", str(trace))
    assert "checked: y " in printed
    assert "of the communication under compute" in printed
    assert trace.stat().st_size > 1000


def test_training_example():
    printed = script(4, "examples/train_bytes.py")
    losses = [float(value) for value in re.findall(r"loss (\S+) nats/byte", printed)]
    assert len(losses) == 7
    assert losses[-1] < losses[0] - 1


@pytest.mark.parametrize("ranks", [1, 4])
def test_cupy_example(ranks):
    printed = script(ranks, "examples/cupy_moe.py", "--device", "host")
    losses = [float(value) for value in re.findall(r"loss (\S+), balance", printed)]
    assert len(losses) == 5
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize("ranks", [2, 4])
def test_example_of_two_groups(ranks):
    printed = script(ranks, "examples/two_groups.py", "--device", "host")
    (error,) = re.findall(
        rf"^2 x {ranks // 2} ranks on host: errors of at most (\S+)$", printed, re.M
    )
    assert 0 < float(error) < 1e-2
    losses = [float(value) for value in re.findall(r"^step \d+: loss (\S+)$", printed, re.M)]
    assert len(losses) == 5
    assert losses[-1] < 0.1 * losses[0]


def test_serving_example():
    printed = script(4, "examples/serve.py", "--batches", "20", "--device", "host")
    (figures,) = re.findall(
        r"^4 ranks on host: (\d+) tokens/s, .* p50 (\S+) ms, p99 (\S+) ms$", printed, re.MULTILINE
    )
    rate, p50, p99 = map(float, figures)
    assert 0 < p50 <= p99
    # Each rank waits in each batch, of 1 to 64 tokens, for all others.
    assert 4 * 1 < rate * p50 / 1e3 < 4 * 2 * 64


def test_demo(tmp_path):
    pytest.importorskip("matplotlib")
    printed = script(4, "examples/demo.py", "--scale", "16", "--out", str(tmp_path))
    assert "every result agrees with the float64 reference" in printed
    assert len(re.findall(r"^rank [0-3]: 256 tokens, ", printed, re.MULTILINE)) == 4
    assert "hidden share:" in printed
    assert (tmp_path / "timeline.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "timeline.json").stat().st_size > 1000


def test_demo_needs_mpi_alone(tmp_path):
    missing = ["rich", "typer", "matplotlib"]
    (tmp_path / "without.py").write_text(
        f"import runpy, sys\nsys.modules |= dict.fromkeys({missing})\n"
        f"sys.path.insert(0, {str(ROOT / 'examples')!r})\n"
        f"runpy.run_path({str(ROOT / 'examples' / 'demo.py')!r}, run_name='__main__')\n"
    )
    options = ["--scale", "64", "--tokens", "16", "--out", str(tmp_path), "--device", "host"]
    printed = script(2, str(tmp_path / "without.py"), *options)
    assert "every result agrees with the float64 reference" in printed
    assert "pip install 'cometrt[plot]'" in printed
    assert (tmp_path / "timeline.json").stat().st_size > 1000


def test_example_stops_with_an_error_when_a_result_is_wrong(tmp_path):
    (tmp_path / "wrong.py").write_text(
        "import sys, runpy\n"
        f"sys.path.insert(0, {str(ROOT / 'examples')!r})\n"
        "from cometrt.cli import inputs\n"
        "inputs.tolerance = lambda spec: 1e-9\n"
        "sys.argv[1:] = ['--scale', '64', '--tokens', '16']\n"
        f"runpy.run_path({str(ROOT / 'examples' / 'moe_layer.py')!r}, run_name='__main__')\n"
    )
    result = mpirun(2, "-m", "mpi4py", str(tmp_path / "wrong.py"), timeout_sec=60)
    assert result.returncode != 0
    assert "wrong results" in result.stderr
